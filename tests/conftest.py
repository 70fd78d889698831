"""Shared by all tests. This file is read before any test imports jax."""

import atexit
import collections
import contextlib
import ctypes
import gc
import itertools
import os
import pathlib
import shutil
import sys
import tempfile

# Four fake CPU devices for the tests of meshes; everything else stays on device 0.
_FOUR_DEVICES = '--xla_force_host_platform_device_count=4'
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FOUR_DEVICES}'.strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# A compilation cache of this run alone, for both of pytest's processes: every run compiles what it tests, but once.
# CONVNORM_TEST_CACHE=FOLDER keeps it for the next run: quicker while a test is written, and no proof of anything.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    kept = os.environ.get('CONVNORM_TEST_CACHE')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = kept or tempfile.mkdtemp(prefix='convnorm_jax_tests_')
    if not kept:
        atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

_ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

import json  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from convnorm_jax.mesh import reserve_host_threads  # noqa: E402

reserve_host_threads()


# Files that take longest, in order: with these first two processes end together.
_LONGEST = tuple(
    f'tests/{name}.py'
    for name in (
        'cli/test_processes', 'cli/test_robustness', 'cli/test_gan', 'layers/test_operation', 'layers/test_derivatives',
        'test_torch_import', 'layers/test_geometry', 'steps/test_gan', 'layers/test_precision', 'test_exported',
        'models/test_gan', 'layers/test_sharding', 'layers/test_folding', 'layers/test_export', 'layers/test_convnorm',
        'attacks/test_inputs', 'models/test_classifiers', 'cli/test_nets', 'cli/test_sweep', 'cli/test_main',
        'steps/test_classify', 'models/test_chains', 'front_ends/test_transformations', 'attacks/test_golden',
    )
)  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist: by the number of tests, which is not their time


def pytest_collection_finish():
    """Python's garbage collector does not walk again and again through what was imported: a tenth of tracing's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest files first; of products of parameters marked `covering` all but a few are slow, or beyond."""
    _mark_products(items)
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition('::')[0], len(place)))


def _mark_products(items):
    """Of a product marked `covering(n)` tests that hold every n values together stay, those for n + 1 become slow.

    The rest is marked `beyond`.
    """
    products = collections.defaultdict(list)
    for item in items:
        mark = item.get_closest_marker('covering')
        if mark and not item.get_closest_marker('slow'):
            products[item.nodeid.partition('[')[0], *mark.args].append(item)
    for (_, strength), product in products.items():
        quick = _covering(product, strength)
        slow = _covering(product, strength + 1, quick)
        for item in product:
            if item not in quick:
                item.add_marker('slow' if item in slow else 'beyond')


def _covering(product, strength, held=()):
    """Tests that together with those `held` have each combination of `strength` values that the product has."""
    values = {item: [(name, id(value)) for name, value in item.callspec.params.items()] for item in product}
    combinations = {item: set(itertools.combinations(pairs, strength)) for item, pairs in values.items()}
    missing = set().union(*combinations.values()).difference(*(combinations[item] for item in held))
    found = []
    while missing:
        found.append(max(product, key=lambda item: len(combinations[item] & missing)))
        missing -= combinations[found[-1]]
    return found


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
    """Drops compiled programs when they hold gigabytes: thousands are compiled in a session."""
    yield
    pages = pathlib.Path('/proc/self/statm')
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > 2e9:
        import jax

        jax.clear_caches()
        with contextlib.suppress(OSError):  # else glibc keeps it
            ctypes.CDLL('libc.so.6').malloc_trim(0)


@pytest.fixture(scope='session')
def golden_dir():
    """Folder of the golden values; see its README.md."""
    return _ROOT / 'tests' / 'golden'


@pytest.fixture(scope='session')
def load_golden(golden_dir):
    """name -> dict of the arrays in tests/golden/{name}.npz."""

    def load(name):
        with np.load(golden_dir / f'{name}.npz') as data:
            return {key: data[key] for key in data.files}

    return load


@pytest.fixture(scope='session')
def golden_weights():
    """(golden net, as `load_golden` gives it) -> its state dict, drawn as tests/golden/README.md says."""

    def draw(golden):
        rng = np.random.default_rng(int(golden['seed']))
        state = {}
        for name, shape in json.loads(str(golden['spec'])):
            a = rng.standard_normal(shape)
            if 'batch_norm.weight' in name or ('norm' in name and name.endswith('weight')):
                a = 1 + 0.1 * a
            elif len(shape) >= 2:
                a = a * np.sqrt(2 / np.prod(shape[1:]))
            else:
                a = 0.1 * a
            state[name] = a.astype(np.float32)
        return state

    return draw


@pytest.fixture(scope='session')
def make_picture_folder():
    """(folder, for each class in train, in val, size) -> the folder, with train/CLASS/*.jpg and val/CLASS/*.jpg.

    Three classes. Every picture is of one grey: 5 times its place, in the order train, val, then class, then name.
    """
    import cv2

    def make(root, train=13, val=4, size=(30, 40)):
        grey = 0
        for part, count in (('train', train), ('val', val)):
            for name in ('ant', 'bee', 'cat'):
                folder = pathlib.Path(root) / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    picture = np.full((*size, 3), grey, np.uint8)
                    cv2.imwrite(str(folder / f'{i:03d}.jpg'), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
                    grey += 5
        if grey > 255 + 5:
            raise AssertionError('more pictures than greys')
        return root

    return make


@pytest.fixture(scope='session')
def nhwc():
    """NCHW array -> NHWC array."""
    return lambda a: np.ascontiguousarray(np.transpose(a, (0, 2, 3, 1)))


@pytest.fixture(scope='session')
def full_spectrum():
    """PyTorch's half spectrum [C, Hf, Wf//2+1] -> [Hf, Wf, C], by V(w) = V(-w), entry by entry."""

    def expand(half, width):
        channels, height, columns = half.shape
        if columns != width // 2 + 1:
            raise AssertionError(f'half spectrum {half.shape} of another width than {width}')
        full = np.empty((height, width, channels), half.dtype)
        for m in range(height):
            for n in range(width):
                full[m, n] = half[:, m, n] if n < columns else half[:, -m % height, width - n]
        return full

    return expand


@pytest.fixture(scope='session')
def older_code_generator():
    """Options of XLA:CPU's older code generator where it has one still: half the time for a small program."""
    import jax

    options = {'xla_cpu_use_fusion_emitters': False}
    try:
        jax.jit(lambda x: x + 1).lower(0.0).compile(options)
    except jax.errors.JaxRuntimeError:  # no such option
        return {}
    return options


@pytest.fixture(scope='session')
def quick_environment(older_code_generator):
    """Variables of a process of one device that compiles as with `quick_compilation`."""
    flags = ' '.join(f'--{name}={str(value).lower()}' for name, value in older_code_generator.items())
    inherited = {name: value for name, value in os.environ.items() if name not in ('XLA_FLAGS', 'NPROC')}
    return {**inherited, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', **({'XLA_FLAGS': flags} if flags else {})}


@pytest.fixture(scope='module')
def quick_compilation(older_code_generator):
    """Without most of XLA's optimizations, for modules that compile many small programs: a third of the time.

    The golden nets of tests/test_torch_import.py run the same layers optimized.
    """
    import jax
    from jax._src import compiler

    compile_options = compiler.get_compile_options

    def quick(*arguments, env_options_overrides=None, **settings):
        options = {**older_code_generator, **(env_options_overrides or {})}
        return compile_options(*arguments, env_options_overrides=options, **settings)

    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, 'get_compile_options', quick)
        yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='module')
def short_programs():
    """AutoAttack in chunks of few iterations: a second of compilation instead of ten."""
    from convnorm_jax.attacks.auto_attack import members

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, '_CPU_CHUNK', {'apgd': 2, 'fab': 2, 'square': 10})
        members.make_member.cache_clear()
        yield
    members.make_member.cache_clear()
