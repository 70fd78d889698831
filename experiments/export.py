"""`convnorm export`, for commands typed in a clone: python -m experiments.export."""

import sys

from convnorm_jax.cli.export import main

if __name__ == '__main__':
    sys.exit(main())
