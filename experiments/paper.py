"""`convnorm paper`, for commands typed in a clone: python -m experiments.paper."""

import sys

from convnorm_jax.cli.paper import main

if __name__ == '__main__':
    sys.exit(main())
