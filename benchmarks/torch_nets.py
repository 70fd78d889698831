"""Converts a trained SimpleCNN to torch, for other libraries' attacks, which take torch nets."""

import numpy as np
import torch
from torch.nn import functional

_BATCH_NORM_EPSILON = 1e-5  # the default of both layers


def carry_over(model, variables, mean, std):
    """Makes the torch net that computes what `model` does at evaluation.

    Args:
      model: a `PlainNet` with layer 'convnorm' (running spectrum) or 'batchnorm', ReLU, float32.
      variables: of the net, {'params': ..., 'batch_stats': ...}.
      mean: of each channel, of pixels in [0, 1]; the torch net normalizes inside.
      std: of each channel, of pixels in [0, 1].

    Returns:
      A `torch.nn.Module`: float32 pixels [B, C, H, W] in [0, 1] -> logits [B, K]. No parameter requires
      a gradient, because an attack needs that of the pixels only.
    """
    params, statistics = variables['params'], variables['batch_stats']
    blocks = []
    for stage, convolutions in enumerate(model.depth, 1):
        for number in range(1, convolutions + 1):
            name = f'conv{stage}_{number}'
            make = ConvNorm if 'kernel' in params[name] else ConvBatchNorm
            blocks += [make(params[name], statistics[name]), torch.nn.ReLU()]
        blocks.append(torch.nn.MaxPool2d(2))
    linear = params['linear']
    net = torch.nn.Sequential(Normalize(mean, std), *blocks, Linear(linear['kernel'], linear['bias']))
    return net.eval().requires_grad_(False)


class Normalize(torch.nn.Module):
    """(pixels - mean) / std for each channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (_parameter(np.reshape(values, (1, -1, 1, 1))) for values in (mean, std))

    def forward(self, x):
        return (x - self.mean) / self.std


class ConvNorm(torch.nn.Module):
    """3x3 ConvNorm with padding 1 at evaluation, with the Fourier transforms of its definition.

    Full convolution, each channel multiplied by its running V in the frequency domain, crop, channel-wise
    convolution, BatchNorm (arXiv 2103.00673, section 3).
    """

    def __init__(self, params, statistics):
        super().__init__()
        self.weight = _kernel(params['kernel'])
        spectrum = np.asarray(statistics['preconditioner'])  # [Hf, Wf, C]
        self.half_spectrum = _parameter(spectrum[:, : spectrum.shape[1] // 2 + 1].transpose(2, 0, 1))
        self.affine_weight = _kernel(params['affine_kernel']) if 'affine_kernel' in params else None
        self.affine_bias = _parameter(params['affine_bias']) if 'affine_bias' in params else None
        has_norm = 'batch_norm' in statistics
        self.norm = BatchNorm(params.get('batch_norm', {}), statistics['batch_norm']) if has_norm else None

    def forward(self, x):
        y = functional.conv2d(x, self.weight, padding=2)
        y = torch.fft.irfft2(torch.fft.rfft2(y) * self.half_spectrum, s=y.shape[-2:])[:, :, 1:-1, 1:-1]
        if self.affine_weight is not None:
            y = functional.conv2d(y, self.affine_weight, self.affine_bias, padding=1, groups=y.shape[1])
        return y if self.norm is None else self.norm(y)


class ConvBatchNorm(torch.nn.Module):
    """3x3 convolution with padding 1 and bias, then BatchNorm."""

    def __init__(self, params, statistics):
        super().__init__()
        self.weight, self.bias = _kernel(params['conv']['kernel']), _parameter(params['conv']['bias'])
        self.norm = BatchNorm(params['norm'], statistics['norm'])

    def forward(self, x):
        return self.norm(functional.conv2d(x, self.weight, self.bias, padding=1))


class BatchNorm(torch.nn.Module):
    """BatchNorm with running statistics; scale and bias if there are any."""

    def __init__(self, params, statistics):
        super().__init__()
        self.mean, self.var = _parameter(statistics['mean']), _parameter(statistics['var'])
        self.scale = _parameter(params['scale']) if 'scale' in params else None
        self.bias = _parameter(params['bias']) if 'bias' in params else None

    def forward(self, x):
        return functional.batch_norm(x, self.mean, self.var, self.scale, self.bias, eps=_BATCH_NORM_EPSILON)


class Linear(torch.nn.Module):
    """Linear layer of all features, flattened with channels first, as the nets here do."""

    def __init__(self, kernel, bias):
        super().__init__()
        self.weight, self.bias = _parameter(np.asarray(kernel).T), _parameter(bias)

    def forward(self, x):
        return functional.linear(x.flatten(1), self.weight, self.bias)


def _kernel(kernel):
    """[kh, kw, cin, cout] -> [cout, cin, kh, kw]."""
    return _parameter(np.asarray(kernel).transpose(3, 2, 0, 1))


def _parameter(array):
    return torch.nn.Parameter(torch.tensor(np.asarray(array, np.float32)), requires_grad=False)
