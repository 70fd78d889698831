"""A net of 1-D ConvNorm layers on scikit-learn's digits, each a sequence of 8 rows with 8 features.

    python -m experiments.main --config=configs/digits_sequence.py

The baseline: --config.model.layer=batchnorm.

Results (seeds 0, 1, 2; 360 test images; attacks at 8/255; digits (scikit-learn, 8x8); 2-core CPU shared with
other work, 45 to 84 s a run):

    layer      test accuracy    FGSM             PGD-10
    ConvNorm   99.17 +- 0.28    91.85 +- 1.40    90.93 +- 1.53
    BatchNorm  99.26 +- 0.58    93.98 +- 0.16    93.15 +- 0.16

Mean and standard deviation (n-1) in %: equal when clean; BatchNorm is more robust to these attacks, as with SimpleCNN.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import digits_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = digits_convnorm.get_config()
    config.model.name = 'sequence_cnn'
    config.model.width = 32
    return config
