"""A 1-D net with ConvNorm on scikit-learn's digits, each a sequence of 8 rows with 8 features.

python -m experiments.main --config=configs/digits_sequence.py
"""

from configs import digits_convnorm


def get_config():
    """Returns the config."""
    config = digits_convnorm.get_config()
    config.model.name = 'sequence_cnn'
    config.model.width = 32
    return config
