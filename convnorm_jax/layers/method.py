"""Chooses the algorithm of ConvNorm's normalized convolution on a CPU by problem size, from measurements."""

from convnorm_jax.layers import bilinear

METHODS = ('frequency', 'spatial', 'reference')

# From this batch on the products over the channels outweigh the kernel's filters, which do not depend on it.
LEAST_BATCH = 8

# Both methods transform as many pictures, the frequency domain to half as many numbers again: with few channels, in
# which there are no products to save, that costs more than it spares on large grids. Four layers in a row, batch 64,
# forward and backward, frequency / spatial (2-core CPU):
#   channels  8     16    32    64
#   32x32     1.20  1.12  0.97  0.69
#   16x16     0.89  0.87  0.64  0.51
#   8x8       0.92  0.70  0.64  0.53
FEW_CHANNELS = 40  # of both sides together
LARGE_GRID = 400  # points

# Numbers in the filters (4 bytes each, and twice that in a backward pass) up to which they are held.
MOST_FILTERS = 2**27


def choose_method(geometry, batch, features_in, features):
    """'frequency' or 'spatial', the one that is expected to be faster.

    Args:
      geometry: see `geometry.Geometry`, in 2 dimensions.
      batch: images; a symbolic dimension (`jax.export`) counts as a large batch.
      features_in, features: channels.
    """
    if geometry.groups > 1:
        return 'spatial'
    filters = bilinear.products(geometry) * features_in * features
    height, width = geometry.grid
    small = features_in + features <= FEW_CHANNELS and height * width >= LARGE_GRID
    large = not isinstance(batch, int) or batch >= LEAST_BATCH
    return 'frequency' if large and filters <= MOST_FILTERS and not small else 'spatial'
