"""Chooses the algorithm of ConvNorm's normalized convolution on a CPU by problem size, from measurements."""

from typing import Any, Literal

from convnorm_jax.layers import bilinear
from convnorm_jax.layers.geometry import Geometry

Method = Literal['frequency', 'spatial', 'reference']
METHODS = ('frequency', 'spatial', 'reference')

# From this batch size on, the products over the channels cost more than the transform of the kernel, whose cost does
# not depend on the batch. benchmarks/README.md, "layer", has the measurements.
LEAST_BATCH = 16

# The largest number of entries of the transformed kernel: 4 bytes each, and twice that in a backward pass.
MOST_FILTERS = 2**27


def choose_method(
    geometry: Geometry, batch: int | Any, features_in: int, features: int
) -> Literal['frequency', 'spatial']:
    """Returns the method that is expected to be faster on a CPU.

    Args:
      geometry: of the layer, in 2 dimensions.
      batch: number of images; a symbolic dimension of `jax.export` counts as a large batch.
      features_in, features: channels.
    """
    if geometry.groups > 1:
        return 'spatial'
    filters = bilinear.products(geometry) * features_in * features
    large = not isinstance(batch, int) or batch >= LEAST_BATCH
    return 'frequency' if large and filters <= MOST_FILTERS else 'spatial'
