"""The version of the package; read without importing JAX."""

__version__ = '0.1.0'
