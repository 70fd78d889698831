"""Stages of the GPU plan that compare: golden values, and ConvNorm's methods with the most exact one, on the device.

Every error is the largest absolute difference over the largest absolute value of what is compared with.
"""

import contextlib
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks.gpu.methods import METHODS
from benchmarks.gpu.speed import in_threads
from benchmarks.layer import Shape
from convnorm_jax import ConvNorm
from convnorm_jax.layers.factory import make_layer
from convnorm_jax.models import create_model
from convnorm_jax.torch_import import import_state_dict

FOLDER = pathlib.Path(__file__).parents[2] / 'tests' / 'golden'
FILES = tuple(f'layer_{letter}' for letter in 'abcdefgh')
NETS = {'simplecnn_attack': ('simple_cnn', 'convnorm'), 'resnet18_convnorm': ('resnet18', 'convnorm')}
NETS['resnet18_batchnorm'] = ('resnet18', 'batchnorm')
# {what it is called: (dtype of the computation, precision of the products or None for JAX's default)}
SETTINGS = {
    'float32': ('float32', None),
    'float32 highest': ('float32', 'highest'),
    'bfloat16': ('bfloat16', None),
}
EXACT = 'reference' if 'reference' in METHODS else METHODS[-1]
SHAPES = (Shape(3, 64, 32, 1, 3), Shape(64, 64, 32, 1, 3), Shape(128, 256, 16, 2, 3), Shape(512, 512, 4, 1, 3))
PARTS = ('train', 'eval', 'grad_x', 'grad_params', 'spectrum')
# Their names in the golden files, which are PyTorch's.
_NAMES = {
    'weight': ('kernel',),
    'bpconv.weight': ('affine_kernel',),
    'bpconv.bias': ('affine_bias',),
    'batch_norm.weight': ('batch_norm', 'scale'),
    'batch_norm.bias': ('batch_norm', 'bias'),
}


def load(name):
    """{key: array} of a golden file."""
    with np.load(FOLDER / f'{name}.npz') as data:
        return {key: data[key] for key in data.files}


def error(actual, expected, scale=None):
    """The largest difference over the largest value, or over `scale`; NaN where something is NaN."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() if scale is None else scale))


def with_precision(precision):
    """The context in which products have it; None for JAX's default."""
    return jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()


# --- golden layers -------------------------------------------------------------------------------


def layers(report, files=FILES):
    """Golden layers: what is chosen by itself in every setting, each method in the most exact one."""
    cases = [(name, None, setting) for name in files for setting in SETTINGS]
    cases += [(name, method, 'float32 highest') for name in files for method in METHODS]
    found, failed = in_threads({case: functools.partial(layer_errors, *case) for case in cases})
    for (name, method, setting), errors in found.items():
        report.row(golden=name, method=method, setting=setting, **errors)
    for method, setting in dict.fromkeys(case[1:] for case in cases):
        of = {name: errors for (name, *rest), errors in found.items() if rest == [method, setting]}
        if of:
            worst = {part: max((errors[part], name) for name, errors in of.items()) for part in PARTS}
            cells = {part: f'{value:.1e} ({name[-1]})' for part, (value, name) in worst.items()}
            report.show({'golden layers, worst of them': method or 'by itself', 'setting': setting, **cells})
    _say_failed(report, failed)


def layer_errors(name, method, setting):
    """{part: error} of one golden file."""
    golden, (dtype, precision) = load(name), SETTINGS[setting]
    c = json.loads(str(golden['config']))
    layer = ConvNorm(
        c['cout'],
        (c['k'],) * 2,
        (c['stride'],) * 2,
        c['padding'],
        use_affine=c['affine'],
        use_batch_norm=c['bn'],
        method=method,
        dtype=jnp.dtype(dtype),
    )
    xs, cotangent = [_nhwc(x) for x in golden['x']], _nhwc(golden['cotangent'])
    params = {_NAMES[key[6:]]: _ours(value) for key, value in golden.items() if key.startswith('param/')}
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, use_running_average=True), xs[0])
    # As published: variances start at 1, everything else at 0.
    stats = {
        path: (np.ones if path[-1] == 'var' else np.zeros)(leaf.shape, leaf.dtype)
        for path, leaf in traverse_util.flatten_dict(shapes['batch_stats']).items()
    }
    params, stats = traverse_util.unflatten_dict(params), traverse_util.unflatten_dict(stats)

    @jax.jit
    def step(params, stats, x):
        def output(params, x):
            variables = {'params': params, 'batch_stats': stats}
            return layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])

        y, back, update = jax.vjp(output, params, x, has_aux=True)
        return y, update['batch_stats'], back(cotangent.astype(y.dtype))

    errors = dict.fromkeys(PARTS, 0.0)
    with with_precision(precision):
        for s, x in enumerate(xs):
            y, stats, gradients = step(params, stats, x)
            errors['train'] = max(errors['train'], error(y, _nhwc(golden[f'train_y{s}'])))
            half = np.asarray(stats['preconditioner'])[:, : golden[f'running_V{s}'].shape[-1]]
            errors['spectrum'] = max(errors['spectrum'], error(half.transpose(2, 0, 1), golden[f'running_V{s}']))
            if s == 0:
                errors['grad_x'] = error(gradients[1], _nhwc(golden['grad_x']))
                errors['grad_params'] = _error_of_gradients(gradients[0], golden, c)
        variables = {'params': params, 'batch_stats': stats}
        y = jax.jit(lambda v, x: layer.apply(v, x, use_running_average=True))(variables, xs[0])
    return {**errors, 'eval': error(y, _nhwc(golden['eval_y']))}


def _error_of_gradients(gradients, golden, config):
    """Before BatchNorm some are zero but for rounding, in the golden values too: on the scale of the largest one."""
    expected = {_NAMES[key[5:]]: _ours(value) for key, value in golden.items() if key.startswith('grad/')}
    largest, found = max(np.abs(value).max() for value in expected.values()), 0.0
    for path, value in traverse_util.flatten_dict(gradients).items():
        nothing = config['bn'] and (path == ('affine_bias',) or (path == ('affine_kernel',) and config['k'] == 1))
        found = max(found, error(value, expected[path], largest if nothing else None))
    return found


def _nhwc(array):
    return array.transpose(0, 2, 3, 1)


def _ours(array):
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


# --- golden nets ---------------------------------------------------------------------------------


def nets(report, files=tuple(NETS)):
    """Golden nets: logits of two training passes and of one evaluation, in every setting."""
    cases = [(name, setting) for name in files for setting in SETTINGS]
    found, failed = in_threads({case: functools.partial(net_errors, *case) for case in cases})
    for (name, setting), errors in found.items():
        report.row(golden=name, setting=setting, **errors)
        report.show({'golden net': name, 'setting': setting, **{k: f'{v:.1e}' for k, v in errors.items()}})
    _say_failed(report, failed)


def net_errors(name, setting):
    """{part: error} of one golden net."""
    golden, (dtype, precision) = load(name), SETTINGS[setting]
    model = create_model(NETS[name][0], num_classes=10, layer=NETS[name][1], dtype=dtype)
    variables = import_state_dict(model, _weights(golden), (1, 32, 32, 3))

    @jax.jit
    def train(variables, images):
        logits, update = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return logits, {**variables, **update}

    errors = {}
    with with_precision(precision):
        for s, x in enumerate(golden['x']):
            logits, variables = train(variables, _nhwc(x))
            errors[f'train {s}'] = error(logits, golden[f'train_logits{s}'])
        logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, _nhwc(golden['x'][0]))
    return {**errors, 'eval': error(logits, golden['eval_logits'])}


def _weights(golden):
    """The state dict of a golden net, drawn as tests/golden/README.md says."""
    rng, state = np.random.default_rng(int(golden['seed'])), {}
    for name, shape in json.loads(str(golden['spec'])):
        a = rng.standard_normal(shape)
        if 'batch_norm.weight' in name or ('norm' in name and name.endswith('weight')):
            a = 1 + 0.1 * a
        else:
            a = a * np.sqrt(2 / np.prod(shape[1:])) if len(shape) >= 2 else 0.1 * a
        state[name] = a.astype(np.float32)
    return state


# --- methods against the most exact one, and what the default precision is ------------------------


def products(report, size=2048, channels=256):
    """What `jax_default_matmul_precision` makes of a float32 product and of a convolution, against float64."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((size, size)).astype(np.float32) for _ in range(2))
    x = random.standard_normal((8, 16, 16, channels)).astype(np.float32)
    k = random.standard_normal((3, 3, channels, channels)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64), _convolved(x.astype(np.float64), k.astype(np.float64))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    for precision in (None, 'tensorfloat32', 'bfloat16', 'highest'):
        with with_precision(precision):
            found = jax.jit(jnp.matmul)(a, b), jax.jit(convolve)(x, k)
        product, convolution = (error(*pair) for pair in zip(found, exact))
        report.row(precision=precision, product=product, convolution=convolution)
        name = precision or "JAX's default"
        report.show({'float32': name, 'product': f'{product:.1e}', 'convolution': f'{convolution:.1e}'})


def _convolved(x, k):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(padded[:, i : i + height, j : j + width] @ k[i, j] for i in range(3) for j in range(3))


def methods(report, shapes=SHAPES, batch_size=32):
    """Layers of ResNet-18 on random images: ConvNorm, and for scale conv + BatchNorm, each against its most exact."""
    shapes = [Shape(*shape) for shape in shapes]
    cases = [(shape, layer, setting) for shape in shapes for layer in ('convnorm', 'batchnorm') for setting in SETTINGS]
    exact = [(shape, layer, None) for shape in shapes for layer in ('convnorm', 'batchnorm')]
    jobs = {case: functools.partial(_layer_values, *case, batch_size) for case in [*exact, *cases]}
    found, failed = in_threads(jobs)
    for shape, layer, setting in cases:
        if {(shape, layer, None), (shape, layer, setting)} - set(found):
            continue
        pairs = zip(found[shape, layer, setting], found[shape, layer, None])
        errors = dict(zip(('output', 'grad_x', 'grad_kernel'), (error(*pair) for pair in pairs)))
        report.row(shape=list(shape), layer=layer, setting=setting, exact=EXACT, **errors)
        title = f'against {EXACT}, float32 highest'
        cells = {k: f'{v:.1e}' for k, v in errors.items()}
        report.show({title: layer, 'shape': '-'.join(map(str, shape)), 'setting': setting, **cells})
    _say_failed(report, failed)


def _layer_values(shape, layer, setting, batch_size):
    """(output, gradients by x and by the kernel) in training; setting None is the most exact method and precision."""
    dtype, precision = SETTINGS[setting or 'float32 highest']
    options = {'method': EXACT} if setting is None and layer == 'convnorm' else {}
    module = make_layer(layer, dtype=jnp.dtype(dtype), **options)(
        shape.features, (shape.kernel,) * 2, strides=(shape.stride,) * 2, padding=(shape.kernel - 1) // 2, train=True
    )
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch_size, shape.size, shape.size, shape.features_in))
    out = shape.size // shape.stride
    cotangent = jax.random.normal(keys[2], (batch_size, out, out, shape.features))

    @jax.jit
    def values(variables, x):
        statistics = {name: value for name, value in variables.items() if name != 'params'}

        def forward(params, x):
            return module.apply({'params': params, **statistics}, x.astype(dtype), mutable=list(statistics))[0]

        y, pull = jax.vjp(forward, variables['params'], x)
        by_params, by_x = pull(cotangent.astype(y.dtype))
        kernel = max(jax.tree.leaves(by_params), key=lambda leaf: leaf.size)
        return y, by_x, kernel

    with with_precision(precision):
        return [np.asarray(v, np.float32) for v in values(jax.jit(module.init)(keys[1], x), x)]


def _say_failed(report, failed):
    for name, reason in failed.items():
        report.row(failed=str(name), reason=reason)
        report.say(f'FAILED: {name}: {reason}')
