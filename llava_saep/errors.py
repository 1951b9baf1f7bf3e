"""The exception for mistakes that a user can correct."""


class UserError(ValueError):
    """A flag, file or record is wrong in a way that the caller can correct.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """
