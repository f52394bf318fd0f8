"""The patterns: one file a family, each stating its equation. Importing this package registers them."""

from . import attention, mla, moe, routing

__all__ = ["attention", "mla", "moe", "routing"]
