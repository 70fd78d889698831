"""A depthwise-separable net (MobileNet) with ConvNorm on scikit-learn's digits.

python -m experiments.main --config=configs/digits_separable.py
"""

from configs import digits_convnorm


def get_config():
    """Returns the config."""
    config = digits_convnorm.get_config()
    config.model.name = 'mobilenet'
    config.model.width = 16
    config.model.depth = (1, 2, 2)
    return config
