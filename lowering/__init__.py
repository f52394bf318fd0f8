"""The lowerings: which kernel runs a semantic op, here, at this shape, and why not the others."""

from . import attention, mla

__all__ = ["attention", "mla"]
