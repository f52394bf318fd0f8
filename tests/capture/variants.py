"""Reference functions of the gated delta rule as text, and copies of them with one thing changed."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Chunked with a substitution row by row, as reference implementations write it.
CHUNKED = '''
import torch
import torch.nn.functional as F


def unit(x, eps=1e-6):
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps)


def attend(query, key, value, g, beta, chunk=8, start=None, with_state=False, norm=False, **unused):
    """Chunk by chunk."""
    dtype = query.dtype
    wide = [x.transpose(1, 2).contiguous().to(torch.float32) for x in (query, key, value, beta, g)]
    query, key, value, beta, g = wide
    if norm:
        query, key = unit(query), unit(key)
    batch, heads, length, dim = key.shape
    pad = (chunk - length % chunk) % chunk
    query = query * dim**-0.5
    query, key, value = (F.pad(x, (0, 0, 0, pad)) for x in (query, key, value))
    beta, g = F.pad(beta, (0, pad)), F.pad(g, (0, pad))
    v_beta, k_beta = value * beta.unsqueeze(-1), key * beta.unsqueeze(-1)
    query, key, v_beta, k_beta = (
        x.reshape(batch, heads, -1, chunk, x.shape[-1]) for x in (query, key, v_beta, k_beta)
    )
    total = g.reshape(batch, heads, -1, chunk).cumsum(dim=-1)
    upper = torch.triu(torch.ones(chunk, chunk, dtype=torch.bool, device=query.device), diagonal=1)
    gap = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(upper, float("-inf")).exp()
    attn = -((k_beta @ key.transpose(-1, -2)) * gap).tril(-1)
    for i in range(1, chunk):
        row, sub = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    attn = attn + torch.eye(chunk, dtype=attn.dtype, device=attn.device)
    fresh, stale = attn @ v_beta, attn @ (k_beta * total.exp().unsqueeze(-1))
    state = torch.zeros(batch, heads, dim, value.shape[-1]).to(value) if start is None else start.to(value)
    out = torch.zeros_like(fresh)
    for i in range((length + pad) // chunk):
        new = fresh[:, :, i] - stale[:, :, i] @ state
        inner = (query[:, :, i] @ key[:, :, i].transpose(-1, -2)) * gap[:, :, i]
        out[:, :, i] = (query[:, :, i] * total[:, :, i, :, None].exp()) @ state + inner @ new
        left = (total[:, :, i, -1:] - total[:, :, i]).exp().unsqueeze(-1)
        state = state * total[:, :, i, -1, None, None].exp() + (key[:, :, i] * left).transpose(-1, -2) @ new
    out = out.reshape(batch, heads, -1, value.shape[-1])[:, :, :length].transpose(1, 2).contiguous().to(dtype)
    return out, state if with_state else None
'''

# What is changed: (old text, new text) pairs. The same meaning, or one that the op's attributes can say.
CAPTURED: dict[str, list[tuple[str, str]]] = {
    "as it is": [],
    "another eps": [("eps=1e-6", "eps=1e-4")],
    "no norm of k": [("unit(query), unit(key)", "unit(query) * 1.0, unit(key)")],
    "norm as a quotient": [
        ("x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps)", "x / ((x**2).sum(-1, True) + eps).sqrt()")
    ],
    "another chunk": [("chunk=8", "chunk=5")],
    "another scale": [("dim**-0.5", "0.3")],
    "scale as a quotient": [("query * dim**-0.5", "query / dim**0.5")],
    "arguments in another order": [("query, key, value, g, beta, chunk=8", "value, beta, key, query, g, chunk=8")],
}
# Another meaning, or one that no small experiment can vouch for.
LEFT: dict[str, list[tuple[str, str]]] = {
    "q alone is normalised": [("unit(query), unit(key)", "unit(query), key")],
    "norm only of long vectors": [("+ eps)", "+ eps).clamp(max=1e3)")],
    "the decay is doubled": [("gap[:, :, i]\n", "gap[:, :, i] * gap[:, :, i]\n")],
    "the diagonal is masked": [("diagonal=1", "diagonal=0")],
    "beta reaches the values only": [("key * beta.unsqueeze(-1)", "key * 1.0")],
    "no decay of the state": [("state = state * total[:, :, i, -1, None, None].exp()", "state = state * 1.0")],
    "the state is not updated": [("    return out, state if", "    state = state * 0.5\n    return out, state if")],
    "a chunk too long to try": [("chunk=8", "chunk=512")],
    "long inputs differ": [("    pad = ", "    if length > 3000:\n        query = query * 2\n    pad = ")],
    "one length differs": [("    pad = ", "    if length == 77:\n        query = query * 2\n    pad = ")],
    "long inputs are cut": [("query = query * dim", "query = query[:, :, :100000] * dim")],
    "writes an argument": [("    dtype = query.dtype", "    dtype = query.dtype\n    g.mul_(1.5)")],
    "reads a table": [
        (
            "import torch\n",
            "TABLE = [1.0]\nimport torch\n",
        ),
        ("dim**-0.5", "dim**-0.5 * TABLE[0]"),
    ],
    "prints": [("    dtype = query.dtype", "    dtype = query.dtype\n    print(dtype)")],
    "looks at values": [
        ("    dtype = query.dtype", "    dtype = query.dtype\n    if g.sum() > 1e9:\n        g = g * 2")
    ],
    "rounds": [("query = query * dim", "query = query.mul(1e6).round().div(1e6) * dim")],
}

_serial = itertools.count()


def changed(text: str, changes: list[tuple[str, str]]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


def load(text: str, folder: Path, name: str = "attend") -> Callable[..., Any]:
    """The function of that name from a fresh module file."""
    path = folder / f"variant_{next(_serial)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Dynamo imports the module of a function that it inlines
    spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, name)
    return found
