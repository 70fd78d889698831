"""The mistakes of a user, as opposed to faults of the program."""


class UserError(ValueError):
    """Something the user gave, or has on disk, that cannot be used; one line says what to do about it.

    A command shows it without a traceback. Every other exception is a fault of the program, or of a library below it,
    and keeps its traceback. It is a ValueError, so that `except ValueError` in code around the library catches it.
    """
