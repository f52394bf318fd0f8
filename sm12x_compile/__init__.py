"""`torch.compile(model, backend="sm12x")`: ordinary PyTorch models on the kernels that suit SM12x GPUs.

Importing the package costs next to nothing: patterns, kernels and what reaches into Dynamo are loaded with the
backend, when its name is looked up by `torch.compile` or any name below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .collect import collect
from .explain import assert_rewritten, explain
from .options import OptionError, Options
from .report import Floor, Report, Site
from .uninstall import uninstall

if TYPE_CHECKING:
    from .arch import Arch
    from .backend import sm12x
    from .index_algebra import Element, Index, Var
    from .match import GraphView, Refusal, Rewrite
    from .registry import YES, Call, No, register_kernel, register_pattern, unregister

__version__ = "0.1.0"

_HOMES = {
    "Arch": "arch", "sm12x": "backend", "Element": "index_algebra", "Index": "index_algebra", "Var": "index_algebra",
    "GraphView": "match", "Refusal": "match", "Rewrite": "match", "YES": "registry", "Call": "registry",
    "No": "registry", "register_kernel": "registry", "register_pattern": "registry", "unregister": "registry",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of the backend, after loading the whole, or a submodule."""
    if name in _HOMES:
        import_module(".backend", __name__)
        globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return globals()[name]
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise missing from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "YES",
    "Arch",
    "Call",
    "Element",
    "Floor",
    "GraphView",
    "Index",
    "No",
    "OptionError",
    "Options",
    "Refusal",
    "Report",
    "Rewrite",
    "Site",
    "Var",
    "assert_rewritten",
    "collect",
    "explain",
    "register_kernel",
    "register_pattern",
    "sm12x",
    "uninstall",
    "unregister",
]
