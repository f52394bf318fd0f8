"""`torch.compile(model, backend="sm12x")`: ordinary PyTorch models on the kernels that suit SM12x GPUs."""

from . import lowering, patterns  # noqa: F401  (registers the built-in patterns and kernels)
from .arch import Arch
from .backend import sm12x
from .capture import wrap as _wrap
from .capture.install import install as _install_capture
from .collect import collect
from .explain import assert_rewritten, explain
from .index_algebra import Element, Index, Var
from .match import GraphView, Refusal, Rewrite
from .options import OptionError, Options
from .registry import YES, Call, No, register_kernel, register_pattern, unregister
from .report import Floor, Report, Site
from .uninstall import uninstall

__version__ = "0.1.0"

_wrap.install()
_install_capture()

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
