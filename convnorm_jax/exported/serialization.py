"""Programs of `jax.export` as bytes; needs the package flatbuffers, which JAX does not install."""

from jax import export

from convnorm_jax.errors import UserError


def check_installed():
    """Raises UserError where the package is missing."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "exported nets need the package flatbuffers: pip install 'convnorm_jax[export]' (or flatbuffers)"
        ) from error


def serialize(program: export.Exported) -> bytes:
    """A program as bytes, without its derivatives.

    Raises:
      ValueError: flatbuffers is missing.
    """
    check_installed()
    return bytes(program.serialize(vjp_order=0))


def deserialize(content: bytes) -> export.Exported:
    """The program in bytes of `serialize`.

    Raises:
      ValueError: flatbuffers is missing.
    """
    check_installed()
    return export.deserialize(bytearray(content))
