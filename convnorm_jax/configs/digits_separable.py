"""A depthwise-separable net (MobileNet) with ConvNorm on scikit-learn's digits.

    python -m experiments.main --config=configs/digits_separable.py

Each depthwise and each pointwise layer is a ConvNorm of its own. The baseline: --config.model.layer=batchnorm. A run
took 70 s on two cores shared with two other processes.

Results (seeds 0, 1, 2; 360 test images; attacks at 8/255; digits (scikit-learn, 8x8); 2-core CPU shared with
other work, 118 to 150 s a run):

    layer      test accuracy    FGSM             PGD-10
    ConvNorm   99.07 +- 0.58    92.22 +- 2.17    90.74 +- 1.58
    BatchNorm  99.26 +- 0.42    92.78 +- 1.00    91.85 +- 1.12

Mean and standard deviation (n-1) in %; the differences are within the spread of the seeds. In the first epochs the
validation loss with ConvNorm can be off by orders of magnitude: see benchmarks/README.md, nets.
"""

from ml_collections import ConfigDict

from convnorm_jax.configs import digits_convnorm


def get_config() -> ConfigDict:
    """The config."""
    config = digits_convnorm.get_config()
    config.model.name = 'mobilenet'
    config.model.width = 16
    config.model.depth = (1, 2, 2)
    return config
