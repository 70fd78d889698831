"""`convnorm attack`, for commands typed in a clone: python -m experiments.attack."""

import sys

from convnorm_jax.cli.attack import main

if __name__ == '__main__':
    sys.exit(main())
