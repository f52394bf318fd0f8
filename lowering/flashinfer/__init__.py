"""FlashInfer's kernels as candidates. Nothing here imports FlashInfer before a kernel of its runs.

    flashinfer.xqa       attention   one query against a cache in place, whose length the device knows
    flashinfer.fa2       attention   prompts and tokens of known length; with sinks by the wrapper that honours them
    flashinfer.mla_xqa   mla         one query of 128 heads over packed latents, SM12x
    flashinfer.mla_fa2   mla         absorbed latent attention of known length
    flashinfer.mla_fa3   mla         the same over long latents of fixed length, on Hopper
    flashinfer.mla_fa3_token   mla   one such token with its projections
    flashinfer.gdn       gated_delta_rule   whole sequences, head dims of 128
    flashinfer.b12x_moe  moe         bf16 rows times MXFP4 experts with silu, SM12x

Merit: they stand below our own kernels for the same calls. Where both run, on an H200, ours are as fast or faster
(benchmarks/results/flashinfer-h200.json), and need no compiler on the user's machine; on SM12x nobody has timed either
here, so the race on the card decides. FA3 is the exception: it is made for Hopper alone, and beats ours there over long
latents. Where ours decline, FlashInfer's stand before PyTorch with a mask tensor.
"""

from __future__ import annotations

from ...registry import accepts_unless, register_kernel
from . import declined as _declined  # noqa: F401  registers the kernels that decline
from .decode import xqa, xqa_refusal
from .delta_rule import gdn_chunked, gdn_refusal
from .experts import b12x_moe, b12x_refusal
from .latent import (
    mla_fa2,
    mla_fa2_refusal,
    mla_fa3,
    mla_fa3_refusal,
    mla_fa3_token,
    mla_fa3_token_refusal,
    mla_xqa,
    mla_xqa_refusal,
)
from .prefill import fa2, fa2_refusal

register_kernel("attention", "flashinfer.xqa", accepts=accepts_unless(xqa_refusal), inline=True, merit=22)(xqa)
register_kernel("attention", "flashinfer.fa2", accepts=accepts_unless(fa2_refusal), merit=21)(fa2)
register_kernel("mla", "flashinfer.mla_xqa", accepts=accepts_unless(mla_xqa_refusal), inline=True, merit=18)(mla_xqa)
register_kernel("mla", "flashinfer.mla_fa2", accepts=accepts_unless(mla_fa2_refusal), merit=17)(mla_fa2)
register_kernel("mla", "flashinfer.mla_fa3", accepts=accepts_unless(mla_fa3_refusal), merit=22)(mla_fa3)
_one_token = register_kernel("mla", "flashinfer.mla_fa3_token", accepts=accepts_unless(mla_fa3_token_refusal), merit=37)
_one_token(mla_fa3_token)
register_kernel("gated_delta_rule", "flashinfer.gdn", accepts=accepts_unless(gdn_refusal), merit=20)(gdn_chunked)
register_kernel("moe", "flashinfer.b12x_moe", accepts=accepts_unless(b12x_refusal), inline=True, merit=22)(b12x_moe)
