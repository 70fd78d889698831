"""Converts programs of `jax.export` to bytes and back, with the package flatbuffers, which JAX does not install."""

from jax import export

from convnorm_jax.errors import UserError


def check_installed() -> None:
    """Raises UserError if the package is not installed."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "exported nets need the package flatbuffers: pip install 'convnorm_jax[export]' (or flatbuffers)"
        ) from error


def serialize(program: export.Exported) -> bytes:
    """Returns a program as bytes, without its derivatives.

    Raises:
      ValueError: flatbuffers is not installed.
    """
    check_installed()
    return bytes(program.serialize(vjp_order=0))


def deserialize(content: bytes) -> export.Exported:
    """Returns the program from the bytes that `serialize` returned.

    Raises:
      ValueError: flatbuffers is not installed.
    """
    check_installed()
    return export.deserialize(bytearray(content))
