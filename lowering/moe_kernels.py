"""Our Triton kernels of `sm12x::moe`, `sm12x::moe_route` and `sm12x::mxfp4_linear`, and what they accept."""

from __future__ import annotations

from sm12x_compile.registry import accepts_unless, register_kernel

from .triton.experts import moe_decode_refusal, moe_experts, moe_refusal
from .triton.moe_route import moe_route, route_refusal
from .triton.mxfp4_linear import linear_refusal, mxfp4_linear

_accepts_decode, _accepts_grouped = accepts_unless(moe_decode_refusal), accepts_unless(moe_refusal)
_accepts_route, _accepts_linear = accepts_unless(route_refusal), accepts_unless(linear_refusal)

# One function under two names: a graph compiled for few tokens may be run with many, and then sorts them.
register_kernel("moe", "triton.moe_decode", accepts=_accepts_decode, merit=30, triton=True)(moe_experts)
register_kernel("moe", "triton.moe_grouped", accepts=_accepts_grouped, merit=25, triton=True)(moe_experts)
register_kernel("moe_route", "triton.moe_route", accepts=_accepts_route, merit=20, triton=True)(moe_route)
register_kernel("mxfp4_linear", "triton.mxfp4_linear", accepts=_accepts_linear, merit=20, triton=True)(mxfp4_linear)
