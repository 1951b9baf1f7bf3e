"""The exception for mistakes that a user can correct."""


class UserError(ValueError):
    """A flag, file or record is wrong in a way that the caller can correct.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            # A data loader re-raises what a worker raised with the worker's traceback as the only argument; the message
            # is its last part.
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class OverloadedError(UserError):
    """More is asked than can be answered at the moment; the same question may be answered later.

    Args:
        retry_after_seconds: when to ask again.
    """

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
