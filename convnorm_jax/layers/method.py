"""By which of two methods ConvNorm computes its normalized convolution: measured, then chosen by size."""

from convnorm_jax.layers import frequency

METHODS = ('frequency', 'spatial')

# From this batch on the products over the channels outweigh the kernel's filters, which do not depend on it.
LEAST_BATCH = 8

# Numbers in the filters (4 bytes each, and twice that in a backward pass) up to which they are held.
MOST_FILTERS = 2**27


def choose_method(geometry, batch, features_in, features):
    """'frequency' or 'spatial', the one that is expected to be faster.

    Args:
      geometry: see `frequency.Geometry`.
      batch: pictures.
      features_in, features: channels.
    """
    filters = frequency.products(geometry) * features_in * features
    return 'frequency' if batch >= LEAST_BATCH and filters <= MOST_FILTERS else 'spatial'
