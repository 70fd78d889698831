"""What the wheel does with nothing but its five dependencies installed; run by .ci/wheel."""

import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from flax import nnx

import convnorm_jax.nnx
from convnorm_jax import ConvNorm, attacks, functional
from convnorm_jax.models import create_model
from convnorm_jax.pretrained import NAMES, load_pretrained

requires = [r.split(';')[0] for r in importlib.metadata.requires('convnorm_jax') if 'extra ==' not in r]
assert len(requires) == 5, requires
for name in ('absl-py', 'ml_collections', 'scikit-learn', 'matplotlib', 'tensorflow-datasets', 'equinox'):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    # Flax's Orbax brings absl-py along.
    assert name == 'absl-py', f'{name} is installed with the core'

images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
variables = ConvNorm(4, (3, 3)).init(jax.random.key(1), images, use_running_average=False)
assert ConvNorm(4, (3, 3)).apply(variables, images, use_running_average=True).shape == (4, 8, 8, 4)
assert convnorm_jax.nnx.ConvNorm(1, 4, (3, 3), image_size=(8, 8), rngs=nnx.Rngs(0))(images).shape == (4, 8, 8, 4)
assert callable(functional.conv_norm)
model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4)
assert model.apply(model.init(jax.random.key(0), images, train=False), images, train=False).shape == (4, 10)
for name in NAMES:
    print(load_pretrained(name).card)
net = load_pretrained('digits_robust')
labels = jnp.arange(4)
options = dict(epsilon=8 / 255, step_size=2 / 255, steps=3, rng=jax.random.key(0))
assert attacks.pgd(net, images, labels, **options).shape == images.shape
assert attacks.autoattack(net, images, labels, epsilon=8 / 255, rng=jax.random.key(0)).shape == images.shape
assert (pathlib.Path(convnorm_jax.nnx.__file__).parents[1] / 'py.typed').exists()
found = subprocess.run([sys.argv[1], 'train', '--config=digits_convnorm'], capture_output=True, text=True)
assert found.returncode == 2 and "pip install 'convnorm_jax[experiments]'" in found.stderr, found
print('core: passed')
