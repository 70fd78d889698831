"""Small trained nets that come with the package: `load_pretrained(name)`.

Each net is NAME.npz, its variables in float32, and NAME.json, its model card: how the net is built, the data, the
command that trained it, what was measured, its limits, and the SHA-256 of the weights.
`benchmarks.pretrained` makes both.
"""

import dataclasses
import hashlib
import importlib.resources
import io
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from convnorm_jax.errors import UserError
from convnorm_jax.models import create_gan, create_model
from convnorm_jax.steps.classify import make_logits_fn
from convnorm_jax.steps.gan import make_sampler

NAMES = ('digits_convnorm', 'digits_robust', 'digits_gan')

_FOLDER = importlib.resources.files(__name__)
# Of the names of variables in the .npz.
_SEPARATOR = '/'


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedClassifier:
    """A trained classifier.

    Called with images, float [B, H, W, C] in [0, 1], it returns float32 logits [B, K]: the `logits_fn` of the attacks.

    Attributes:
      model: the Linen module; it takes normalized images.
      variables: its 'params' and 'batch_stats', NumPy arrays.
      card: the model card, see `Card`.
    """

    model: nn.Module
    variables: dict[str, Any]
    card: 'Card'

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, K] of images [B, H, W, C] in [0, 1]."""
        return self._logits_fn(self.variables, images)

    @property
    def _logits_fn(self) -> Callable:
        return make_logits_fn(self.model, self.card.content['mean'], self.card.content['std'])


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedGenerator:
    """A trained conditional generator.

    Attributes:
      model: the Linen module; `model.apply(variables, z, labels, train=False)` returns images in [-1, 1].
      variables: its 'params' and 'batch_stats', NumPy arrays.
      card: the model card, see `Card`.
    """

    model: nn.Module
    variables: dict[str, Any]
    card: 'Card'

    def sample(self, key: jax.Array, labels: jax.Array) -> jax.Array:
        """Images of given classes, float32 [B, H, W, C] in [0, 1].

        Args:
          key: of the latents.
          labels: int [B].
        """
        z = jax.random.normal(key, (len(labels), self.card.content['model']['latent']))
        return make_sampler(self.model)(self.variables, z, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Card:
    """A model card; printed, it is Markdown.

    Attributes:
      content: what NAME.json holds.
    """

    content: dict[str, Any]

    def __str__(self) -> str:
        card = self.content
        figures = '\n'.join(f'| {name} | {value} |' for name, value in card['figures'].items())
        commands = '\n'.join(card['commands'])
        limits = '\n'.join(f'- {line}' for line in card['limits'])
        return (
            f'# {card["name"]}\n\n{card["description"]}\n\nData: {card["data"]}. {card["parameters"]:,} parameters. '
            f'Weights: SHA-256 {card["sha256"]}.\n\n```bash\n{commands}\n```\n\n'
            f'| measured ({card["measured_by"]}) | |\n|---|---|\n{figures}\n\nLimits:\n\n{limits}\n'
        )


def load_pretrained(name: str) -> PretrainedClassifier | PretrainedGenerator:
    """A trained net that comes with the package.

    >>> import jax.numpy as jnp
    >>> from convnorm_jax.pretrained import load_pretrained
    >>> net = load_pretrained('digits_convnorm')
    >>> net(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)

    Args:
      name: one of `NAMES`: 'digits_convnorm', a classifier of scikit-learn's digits; 'digits_robust', the same net,
        trained against attacks at 32/255; 'digits_gan', a generator of digits. `print(net.card)` says more.

    Raises:
      UserError: an unknown name; a file of the package that is missing or damaged.
    """
    if name not in NAMES:
        raise UserError(f'name={name!r}: expected one of {NAMES}')
    card = json.loads(_read(f'{name}.json'))
    content = _read(f'{name}.npz')
    if hashlib.sha256(content).hexdigest() != card['sha256']:
        raise UserError(f'{_FOLDER / f"{name}.npz"}: is damaged (its SHA-256 differs); install convnorm_jax again')
    with np.load(io.BytesIO(content)) as arrays:
        variables = traverse_util.unflatten_dict(dict(arrays), sep=_SEPARATOR)
    if card['kind'] == 'classifier':
        return PretrainedClassifier(create_model(**card['model']), variables, Card(card))
    return PretrainedGenerator(create_gan(**card['model'])[0], variables, Card(card))


def _read(name):
    try:
        return (_FOLDER / name).read_bytes()
    except OSError as error:
        raise UserError(f'{_FOLDER / name}: cannot be read ({error.strerror}); install convnorm_jax again') from error
