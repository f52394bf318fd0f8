"""The patterns: one file a family, each stating its equation. Importing this package registers them."""

from . import attention, mla, moe

__all__ = ["attention", "mla", "moe"]
