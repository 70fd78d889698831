"""Runs the published PyTorch code of ConvNorm, to be timed next to ours.

None of that code is here: the user gives a checkout of https://github.com/shengliu66/ConvNorm. It calls torch.rfft and
torch.irfft, which PyTorch removed in 1.8. They are restored here with torch.fft, over the last two axes and at the
image's own size.

    python -m benchmarks.published CHECKOUT NET LAYER BATCH_SIZE

makes a step for each line on its standard input, and reports it; `StepInProcess` is the other side. So a step is timed
in a process of its own, as its users run it, in turn with ours.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import types

from benchmarks import machine

NAMES = {'convnorm': 'published convnorm', 'batchnorm': 'published batchnorm'}
NETS = ('resnet18', 'simple_cnn')
# The names in its own config: of the convolution, and of the normalization after it.
_LAYER_TYPES = {'convnorm': ('prec_conv', 'no'), 'batchnorm': ('conv', 'bn')}


def check(checkout):
    """Raises SystemExit if torch is not installed, or the checkout is not one; imports neither."""
    if not os.path.isfile(os.path.join(checkout, 'models', 'prec_conv.py')):
        raise SystemExit(f'error: --torch={checkout}: not a checkout of https://github.com/shengliu66/ConvNorm')
    if importlib.util.find_spec('torch') is None:
        raise SystemExit(f'error: --torch={checkout}: torch is not installed (pip install torch)')


class Published:
    """A checkout, imported.

    Raises:
      SystemExit: see `check`.
    """

    def __init__(self, checkout):
        check(checkout)
        import torch

        torch.set_num_threads(machine.cores())
        self.torch, self._device = torch, 'cuda' if torch.cuda.is_available() else 'cpu'
        _restore_transforms(torch)
        modules = _import_from(checkout)
        self._convnorm, self._nets = modules['models.prec_conv'].Preconditioned_Conv2d, modules['models.model']

    def convolution_and_norm(self, layer, features_in, features, **settings):
        """The module of one of the layers of `NAMES`; settings as for torch.nn.Conv2d."""
        if layer == 'convnorm':
            return self._convnorm(features_in, features, **settings).to(self._device)
        conv = self.torch.nn.Conv2d(features_in, features, bias=False, **settings)
        return self.torch.nn.Sequential(conv, self.torch.nn.BatchNorm2d(features)).to(self._device)

    def layer_programs(self, layer, shape, batch_size):
        """(training, inference): functions without arguments, ending in a ReLU; shape as in `benchmarks.layer`."""
        torch = self.torch
        settings = {'kernel_size': shape.kernel, 'stride': shape.stride, 'padding': (shape.kernel - 1) // 2}
        module = self.convolution_and_norm(layer, shape.features_in, shape.features, **settings)
        x = torch.randn(batch_size, shape.features_in, shape.size, shape.size, device=self._device, requires_grad=True)
        cotangent = torch.randn_like(torch.relu(module(x))).detach()

        def training():
            module.train()
            found = torch.autograd.grad(torch.relu(module(x)), [x, *module.parameters()], cotangent)
            return self._wait(found)

        def inference():
            module.eval()
            with torch.no_grad():
                return self._wait(torch.relu(module(x)))

        return training, inference

    def step_program(self, net, layer, batch_size):
        """A function without arguments that makes one update of a net on 32x32 images, augmented beforehand."""
        torch = self.torch
        conv, norm = _LAYER_TYPES[layer]
        make = {'resnet18': self._nets.resnet18, 'simple_cnn': self._nets.simpleCNN}[net]
        model = make(conv_layer_type=conv, norm_layer_type=norm).to(self._device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        images = torch.randn(batch_size, 3, 32, 32, device=self._device)
        labels = torch.randint(10, (batch_size,), device=self._device)

        def step():
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()  # waits, as the published loop does

        return step

    def _wait(self, result):
        if self._device == 'cuda':
            self.torch.cuda.synchronize()
        return result


class StepInProcess:
    """A step of a published net in a process of its own; a call makes a step and returns when it is done.

    Raises:
      SystemExit: the process ended; it has printed the reason.
    """

    def __init__(self, checkout, net, layer, batch_size):
        command = [sys.executable, '-m', 'benchmarks.published', checkout, net, layer, str(batch_size)]
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        # As its users run it: without the variable that our commands set for themselves.
        environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self._answer()

    def __call__(self):
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        self._answer()

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self):
        if not self._process.stdout.readline():
            raise SystemExit(f'the process of the published net ended (exit code {self._process.wait()})')


def main():
    """Makes a step for each line of standard input."""
    checkout, net, layer, batch_size = sys.argv[1:]
    step = Published(checkout).step_program(net, layer, int(batch_size))
    print('ready', flush=True)
    for _ in sys.stdin:
        step()
        print('done', flush=True)


def _restore_transforms(torch):
    """Restores torch.rfft and torch.irfft of before 1.8, with real and imaginary parts on a last axis."""

    def rfft(x, signal_ndim, normalized=False, onesided=True):
        assert onesided
        axes, norm = tuple(range(-signal_ndim, 0)), 'ortho' if normalized else 'backward'
        return torch.view_as_real(torch.fft.rfftn(x, dim=axes, norm=norm))

    def irfft(x, signal_ndim, normalized=False, onesided=True, signal_sizes=None):
        assert onesided
        # The size must be given, because 33 and 32 columns have the same number of frequencies.
        axes, norm = tuple(range(-signal_ndim, 0)), 'ortho' if normalized else 'backward'
        return torch.fft.irfftn(torch.view_as_complex(x), s=signal_sizes, dim=axes, norm=norm)

    for name, function in (('rfft', rfft), ('irfft', irfft)):
        if not hasattr(torch, name):
            setattr(torch, name, function)


def _import_from(checkout):
    """Imports its nets: {name: module}. Its packages have common names, so they are removed from sys.modules again."""
    # Only the nets of its package `base`: the rest is its training loop, which needs more packages.
    base = types.ModuleType('base')
    base.__path__ = [os.path.join(checkout, 'base')]
    before = {name: module for name, module in sys.modules.items() if name.split('.')[0] in ('base', 'models')}
    sys.path.insert(0, os.path.abspath(checkout))
    try:
        for name in before:
            del sys.modules[name]
        sys.modules['base'] = base
        base.BaseModel = importlib.import_module('base.base_model').BaseModel
        return {name: importlib.import_module(name) for name in ('models.prec_conv', 'models.model')}
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split('.')[0] in ('base', 'models')]:
            del sys.modules[name]
        sys.modules.update(before)


if __name__ == '__main__':
    main()
