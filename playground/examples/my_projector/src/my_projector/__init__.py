"""A projector for llava-saep in a package of its own; the entry point in pyproject.toml announces it."""

from .edge_pool import EdgePool, EdgePoolConfig

__all__ = ["EdgePool", "EdgePoolConfig"]
