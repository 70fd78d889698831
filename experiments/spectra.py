"""`convnorm spectra`, for commands typed in a clone: python -m experiments.spectra."""

import sys

from convnorm_jax.cli.spectra import main

if __name__ == '__main__':
    sys.exit(main())
