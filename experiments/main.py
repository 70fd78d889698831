"""`convnorm train` and `convnorm eval`, for commands typed in a clone: python -m experiments.main."""

import sys

from convnorm_jax.cli.run import main

if __name__ == '__main__':
    sys.exit(main())
