"""The one exception of this package, apart so that every module can import it."""


class ProjectorError(ValueError):
    """A projector's name, option, input or checkpoint is wrong in a way that the caller can correct."""
