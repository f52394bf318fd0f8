"""The lowerings: which kernel runs a semantic op, here, at this shape, and why not the others."""

from . import attention, mla, moe

__all__ = ["attention", "mla", "moe"]
