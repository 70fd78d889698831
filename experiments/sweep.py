"""`convnorm sweep`, for commands typed in a clone: python -m experiments.sweep."""

import sys

from convnorm_jax.cli.sweep import main

if __name__ == '__main__':
    sys.exit(main())
