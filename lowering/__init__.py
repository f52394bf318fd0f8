"""The lowerings: which kernel runs a semantic op, here, at this shape, and why not the others."""

from . import attention

__all__ = ["attention"]
