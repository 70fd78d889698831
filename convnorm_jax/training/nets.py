"""The nets of a config."""

from collections.abc import Sequence

from flax import linen as nn
from ml_collections import ConfigDict

from convnorm_jax.models.classifiers import create_model
from convnorm_jax.models.gan import create_gan

# (learning rate, first beta, second beta, n_dis) of Adam: table 1 of the SNGAN paper (arXiv 1802.05957).
ADAM_SETTINGS = {
    'A': (1e-4, 0.5, 0.9, 5),
    'B': (1e-4, 0.5, 0.999, 1),
    'C': (2e-4, 0.5, 0.999, 1),
    'D': (1e-3, 0.5, 0.9, 5),
    'E': (1e-3, 0.5, 0.999, 5),
    'F': (1e-3, 0.9, 0.999, 5),
}


def build_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """The net of a config.

    Raises:
      UserError: see `create_model`.
    """
    model = config.model
    return create_model(
        model.name,
        num_classes=num_classes,
        layer=model.layer,
        width=model.width,
        depth=model.depth,
        stem=model.stem or None,
        activation=model.activation,
        dtype=model.dtype,
        **_layer_options(model, model.layer),
    )


def build_gan(config: ConfigDict, image_shape: Sequence[int], num_classes: int) -> tuple[nn.Module, nn.Module]:
    """(generator, discriminator) of a config.

    Args:
      config: checked.
      image_shape: [H, W, C].
      num_classes: of the data; used if config.gan.conditional is set.

    Raises:
      UserError: see `create_gan`.
    """
    model, gan = config.model, config.gan
    return create_gan(
        model.name,
        picture_shape=tuple(image_shape),
        latent=gan.latent,
        num_classes=num_classes if gan.conditional else 0,
        generator_layer=gan.generator_layer or None,
        discriminator_layer=model.layer,
        generator_width=gan.generator_width,
        discriminator_width=model.width,
        generator_options=_layer_options(model, gan.generator_layer),
        discriminator_options=_layer_options(model, model.layer),
        dense=gan.dense,
        dtype=model.dtype,
    )


def resolve_setting(config: ConfigDict) -> ConfigDict:
    """The config with the values that its `gan.setting` stands for."""
    if not config.gan.setting:
        return config
    config = ConfigDict(config.to_dict())
    section = config.optimizer
    section.name = 'adam'
    section.learning_rate, section.momentum, section.beta2, config.gan.n_dis = ADAM_SETTINGS[config.gan.setting]
    return config


def _layer_options(model, layer):
    return {key: value for key, value in model.get(layer, {}).items() if value is not None}
