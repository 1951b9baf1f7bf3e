"""Names of LLaVA's `llava.utils` that its users' programs import."""


def disable_torch_init() -> None:
    """Do nothing: LLaVA spares itself the drawing of weights that are read next, which no loading here does."""
