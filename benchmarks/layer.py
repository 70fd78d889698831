"""Compares ConvNorm with convolution and BatchNorm, layer by layer: every convolution shape of ResNet-18 on 32x32.

    python -m benchmarks.layer [--batch_sizes=32,128] [--dtypes=float32] [--repeats=7]
        [--methods=frequency,spatial] [--shapes=CIN-COUT-SIZE-STRIDE-KERNEL,...] [--output=FILE.json]
        [--torch=CHECKOUT]

Milliseconds, medians over the repeats, with all layers in turn within each. Training is forward and backward with
batch statistics and their update: the gradients with respect to the image and all parameters, from a given cotangent.
Inference uses running statistics. "conv" is the convolution alone; the others end in a ReLU, as in the net. A 1x1
kernel leaves no choice of method. The method that ConvNorm chooses is found by comparing its program with that of each
method. The last row sums the net's layers, each as often as it occurs. --torch also times the published layers of a
checkout of https://github.com/shengliu66/ConvNorm (float32).

The lower bound of training is the longer of two times: operations divided by the rate of a large dense product, and
bytes divided by the rate of a copy, both measured here. Operations are 2 for each tap that meets a pixel and each pair
of channels, three times: forward and both gradients. For ConvNorm they are those of the chosen method: of the full
convolution, or of 1.5 products for each grid point and pair of channels; then the transforms of images, 2.5 N log2 N
for N points as in a fast transform, and those of the kernel, as a product. Bytes are what must go through memory if
everything possible is fused. The image is read twice and its gradient written (3). The convolution's output is written
once and read three times, the layer's output written once, its cotangent read twice (7). The kernel is read twice and
its gradient written. ConvNorm adds the full convolution, or its spectrum, written and read in both directions (4); in
the frequency domain also the spectrum of the image and of its gradient (4), and that of the kernel (5).
"""

import argparse
import collections
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import machine, timing
from convnorm_jax import ConvNorm, mesh
from convnorm_jax.layers.factory import make_layer

Shape = collections.namedtuple('Shape', 'features_in features size stride kernel')
# {shape: how often it occurs in ResNet-18}
RESNET18 = {
    Shape(3, 64, 32, 1, 3): 1,
    Shape(64, 64, 32, 1, 3): 4,
    Shape(64, 128, 32, 2, 3): 1,
    Shape(128, 128, 16, 1, 3): 3,
    Shape(128, 256, 16, 2, 3): 1,
    Shape(256, 256, 8, 1, 3): 3,
    Shape(256, 512, 8, 2, 3): 1,
    Shape(512, 512, 4, 1, 3): 3,
    Shape(64, 128, 32, 2, 1): 1,
    Shape(128, 256, 16, 2, 1): 1,
    Shape(256, 512, 8, 2, 1): 1,
}


def main():
    """Prints a table for each batch size and dtype, and writes all of them to --output."""
    options = _options()
    published = None
    if options.torch:
        from benchmarks.published import Published

        published = Published(options.torch)
    rates = {dtype: timing.machine_rates(dtype) for dtype in options.dtypes}
    print(machine.description())
    timing.say_rates(rates)
    rows = []
    for dtype in options.dtypes:
        for batch_size in options.batch_sizes:
            reference = published if dtype == 'float32' else None
            found = [_measure(options, shape, batch_size, dtype, rates[dtype], reference) for shape in options.shapes]
            _print(found, options)
            rows += found
    timing.save(options, rates, rows, *(['torch'] if published else []))


def _options():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch_sizes', type=timing.numbers, default='32,128')
    parser.add_argument('--dtypes', type=timing.names, default='float32')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--methods', type=timing.names, default='frequency,spatial')
    parser.add_argument('--shapes', type=_shapes, default=list(RESNET18), help='CIN-COUT-SIZE-STRIDE-KERNEL by commas')
    parser.add_argument('--torch', metavar='CHECKOUT', help='of the published code')
    parser.add_argument('--output', help='a JSON file')
    return parser.parse_args()


def _shapes(text):
    return [Shape(*map(int, name.split('-'))) for name in timing.names(text)]


def _measure(options, shape, batch_size, dtype, rates, published):
    """One row: the layers at one shape."""
    layers, chosen = build_layers(options.methods, shape, batch_size, dtype)
    training = {name: layer.training for name, layer in layers.items()}
    inference = {name: layer.inference for name, layer in layers.items()}
    if published:
        from benchmarks.published import NAMES

        for layer, name in NAMES.items():
            training[name], inference[name] = published.layer_programs(layer, shape, batch_size)
    training_ms = timing.medians_ms(timing.interleaved(training, options.repeats))
    base, ours = _cost(shape, batch_size, dtype), _cost(shape, batch_size, dtype, chosen)
    return {
        'shape': shape._asdict(),
        'batch_size': batch_size,
        'dtype': dtype,
        'chosen': chosen,
        'training_ms': training_ms,
        'inference_ms': timing.medians_ms(timing.interleaved(inference, options.repeats)),
        'ratio': training_ms[chosen] / training_ms['batchnorm'],
        'costs': {'batchnorm': base, chosen: ours},
        'floor_ms': {'batchnorm': timing.floor_ms(*base, rates), chosen: timing.floor_ms(*ours, rates)},
    }


def build_layers(methods, shape, batch_size, dtype):
    """({name: a layer, whose `training` and `inference` take no arguments}, the name of the chosen ConvNorm)."""
    build = functools.partial(_Layer, shape, batch_size, dtype)
    settings = {'strides': (shape.stride,) * 2, 'padding': (shape.kernel - 1) // 2}
    dtype = jnp.dtype(dtype)
    plain, batchnorm = (make_layer(name, dtype=dtype) for name in ('none', 'batchnorm'))
    layers = {'conv': build(lambda train: plain(*_size(shape), **settings), activation=lambda y: y)}
    layers['batchnorm'] = build(lambda train: batchnorm(*_size(shape), train=train, **settings))

    def convnorm(method, train):
        return ConvNorm(*_size(shape), **settings, dtype=dtype, method=method, use_running_average=not train)

    free = build(functools.partial(convnorm, None))
    if shape.kernel == 1:
        return {**layers, 'pointwise': free}, 'pointwise'
    forced = {method: build(functools.partial(convnorm, method)) for method in methods}
    same = [method for method, layer in forced.items() if layer.text == free.text]
    return {**layers, **forced, **({} if same else {'chosen': free})}, same[0] if same else 'chosen'


def _size(shape):
    return shape.features, (shape.kernel,) * 2


class _Layer:
    """A layer with its arguments on the device; its programs are functions without arguments.

    Attributes:
      text: the compiled program of training.
    """

    def __init__(self, shape, batch_size, dtype, make, activation=nn.relu):
        """`make`: whether it trains -> Linen module."""
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (batch_size, shape.size, shape.size, shape.features_in), dtype)
        variables = dict(jax.jit(make(False).init)(keys[1], x))
        params = variables.pop('params')

        def training(params, statistics, x, cotangent):
            def forward(params, x):
                y, new = make(True).apply({'params': params, **statistics}, x, mutable=list(statistics))
                return activation(y), new

            y, pull, new = jax.vjp(forward, params, x, has_aux=True)
            return y, pull(cotangent), new

        infer = jax.jit(lambda variables, x: activation(make(False).apply(variables, x)))
        cotangent = jax.random.normal(keys[2], jax.eval_shape(infer, {'params': params, **variables}, x).shape, dtype)
        arguments = params, variables, x, cotangent
        lowered = jax.jit(training).lower(*arguments)
        self.text, train = lowered.as_text(), lowered.compile(mesh.compiler_options())
        self.training = lambda: train(*arguments)
        self.inference = lambda: infer({'params': params, **variables}, x)


def _cost(shape, batch_size, dtype, method=None):
    """(operations, bytes) of training: of ConvNorm by a method, else of conv and BatchNorm; see the module."""
    pairs, k = shape.features_in * shape.features, shape.kernel
    out = -(-shape.size // shape.stride)
    meeting = sum(0 <= i * shape.stride + t - (k - 1) // 2 < shape.size for i in range(out) for t in range(k))
    grid = (shape.size + k - 1) ** 2
    x, y = batch_size * shape.size**2 * shape.features_in, batch_size * out**2 * shape.features
    full, spectra = batch_size * grid * shape.features, batch_size * grid * shape.features_in
    a_transform, of_kernel = 2.5 * math.log2(grid), 2 * k**2 * grid * pairs
    width = jnp.dtype(dtype).itemsize
    size = width * (3 * x + 7 * y) + 3 * 4 * k**2 * pairs  # kernels are float32
    if method == 'spatial':
        operations = 3 * 2 * batch_size * (shape.size * k) ** 2 * pairs + 4 * full * a_transform + of_kernel
        return operations, size + width * 4 * full
    if method == 'frequency':
        operations = 3 * 2 * 1.5 * batch_size * grid * pairs + 2 * (full + spectra) * a_transform + 2 * of_kernel
        return operations, size + width * (4 * full + 4 * spectra + 5 * grid * pairs)
    return 3 * 2 * batch_size * meeting**2 * pairs, size


def _print(rows, options):
    print(f'\nbatch {rows[0]["batch_size"]}, {rows[0]["dtype"]}, medians of {options.repeats}, ms')
    counts = [RESNET18.get(Shape(**row['shape']), 0) for row in rows]
    cells = [_cells(row, count, options.methods) for row, count in zip(rows, counts)]
    timing.print_table([*cells, _total(cells, counts)] if all(counts) else cells)


def _cells(row, count, methods):
    """{column: cell}"""
    shape, training, inference, chosen = Shape(**row['shape']), row['training_ms'], row['inference_ms'], row['chosen']
    name = f'{shape.size}x{shape.size}, {shape.features_in} -> {shape.features}, {shape.kernel}x{shape.kernel}'
    return {
        'shape': name + (f', stride {shape.stride}' if shape.stride > 1 else ''),
        'in the net': count,
        'conv': training['conv'],
        'conv + BN + ReLU': training['batchnorm'],
        **{f'ConvNorm + ReLU, {method}': training.get(method) for method in methods},
        'chosen': chosen,
        'ms': training[chosen],
        'ratio': row['ratio'],
        'floor conv + BN': row['floor_ms']['batchnorm'],
        'floor ConvNorm': row['floor_ms'][chosen],
        **{name: value for name, value in training.items() if name.startswith('published')},
        'inference conv + BN + ReLU': inference['batchnorm'],
        'inference ConvNorm + ReLU': inference[chosen],
    }


def _total(cells, counts):
    """Sums over the net; those of a method include the 1x1 kernels, which leave no choice of method."""
    total = dict.fromkeys(cells[0])
    for column, first in cells[0].items():
        if not isinstance(first, str):
            values = [row['ms'] if row[column] is None else row[column] for row in cells]
            total[column] = sum(value * count for value, count in zip(values, counts))
    total.update({'shape': 'sum', 'in the net': sum(counts)})
    return {**total, 'ratio': total['ms'] / total['conv + BN + ReLU']}


if __name__ == '__main__':
    main()
