"""Code whose naive rewriting would be wrong: aliases, writes between, Python state, order of evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

T, D = 7, 6


def mask_changed(x: Tensor, m: Tensor) -> Any:
    rows = x[m] * 2
    m = m.clone()
    y = x.clone()
    keep = m
    keep[0] = ~keep[0]
    keep[1] = ~keep[1]
    y[keep] = 0
    return (y, rows.sum())


def alias_source(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    v = y.view(-1)
    r = y[m]
    v.mul_(3)
    y[m] = r
    return y


def alias_rows_view(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    r = y[m]
    a = r[:, :2]
    r = r * 2
    y[m] = r
    y[m] += 1
    z = torch.zeros(T, 2)
    z[m] = a
    return y + z.sum()


def inplace_on_rows(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    r = y[m]
    r.mul_(2)
    r += 1
    out = y.clone()
    out[m] = r
    return (out, y)


def inplace_chunk(x: Tensor, m: Tensor) -> Any:
    r = x[m] + 1
    a, _b = r.chunk(2, -1)
    a.mul_(0)
    out = x.clone()
    out[m] = r
    return out


def carried(x: Tensor, m: Tensor) -> Any:
    last = None
    out = x.clone()
    for i in m.nonzero().flatten():
        if last is not None:
            out[i] = out[last] + 1
        last = i
    return out


def count_hits(x: Tensor, m: Tensor) -> Any:
    n = 0
    for _i in m.nonzero():
        n += 1
    return x * n


def nested_fn(x: Tensor, m: Tensor) -> Any:

    def g(r):
        return r * 2 + x[0]

    y = x.clone()
    y[m] = g(x[m])
    return y


def default_arg(x: Tensor, m: Tensor, scale: float = 3.0, *, k: float = 2.0) -> Any:
    y = x.clone()
    y[m] = x[m] * scale + k
    return y


def int_mask_index(x: Tensor, m: Tensor) -> Any:
    i = m.long()
    return x[i] * 2 + x[m].sum()


def bool_list(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    y[m, 0] = 5.0
    y[m][:] = 7
    return y


def setcol(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    y[m, 1:3] = x[m, 1:3] * 2
    return y


def wherescalar(x: Tensor, m: Tensor) -> Any:
    idx = torch.where(m)[0]
    y = x.clone()
    y[idx] = y[idx] / y[idx].norm(dim=-1, keepdim=True)
    return y


def twice(x: Tensor, m: Tensor) -> Any:
    sel = torch.stack([m.long(), m.long()], 1)
    out = torch.zeros_like(x)
    w = torch.arange(T * 2.0).view(T, 2)
    for e in range(2):
        t, k = torch.where(sel == e)
        out[t] += x[t] * w[t, k, None]
    return out


def twice_indexadd(x: Tensor, m: Tensor) -> Any:
    sel = torch.stack([m.long(), m.long()], 1)
    out = torch.zeros_like(x)
    w = torch.arange(T * 2.0).view(T, 2)
    for e in range(2):
        t, k = torch.where(sel == e)
        out.index_add_(0, t, torch.tanh(x[t] * w[t, k, None]))
        out.index_add_(0, t, x[t])
    return out


def half(x: Tensor, m: Tensor) -> Any:
    x = x.bfloat16()
    out = torch.zeros_like(x)
    i = m.nonzero().squeeze(1)
    out.index_add_(0, i, (x[i].float() * 1.7).to(out.dtype))
    return out


def ifelse_alias(x: Tensor, m: Tensor) -> Any:
    y = x.clone()
    z = y
    if m.any():
        z = z * 2
        y.add_(1)
    else:
        y.sub_(1)
    return (y, z)


def if_inplace_arg(x: Tensor, m: Tensor) -> Any:
    if m.any():
        x += 1
    return x * 2


def deep(x: Tensor, m: Tensor) -> Any:
    y = x
    for k in range(3):
        if y.sum() > k and m.any():
            y = y - 0.5
        elif y.sum() < -1 or not m.all():
            y = y + 0.25
        else:
            continue
        y = y * 1.1
    return y


def returns_early(x: Tensor, m: Tensor) -> Any:
    if m.all():
        return (x, 1)
    if m.any():
        return (x * 2, 1)
    return (x * 3, 1)


def py_number_result(x: Tensor, m: Tensor) -> Any:
    if m.any():
        n = 2
    else:
        n = 3
    return x * n


def intfloat(x: Tensor, m: Tensor) -> Any:
    s = m.sum().item()
    f = x.sum().item()
    return (x * s + (s + 1) * 2 - f * 0.1 + (m * f)[:, None] + (m.long() * f)[:, None], x.bfloat16() * f)


def floor_mod(x: Tensor, m: Tensor) -> Any:
    s = (m.sum() - 3).item()
    return x + s // 2 + s % 3 - -s


def cmp_numbers(x: Tensor, m: Tensor) -> Any:
    s = m.sum().item()
    if 2 <= s <= 4:
        return x + 1
    return x - 1


def where_1d_of_2d(x: Tensor, m: Tensor) -> Any:
    mm = x > 0.3
    r, c = torch.where(mm)
    out = torch.zeros(D)
    out.index_add_(0, c, x[r, c])
    o2 = torch.zeros(T)
    o2.index_add_(0, r, x[r, c] * 2)
    return (out, o2)


def perm_gather(x: Tensor, m: Tensor) -> Any:
    r, c = torch.where((x > 0.3).t())
    out = torch.zeros(D)
    out.index_add_(0, r, x[c, r])
    return out


def shifted_index(x: Tensor, m: Tensor) -> Any:
    i = torch.where(m)[0]
    out = torch.zeros(T + 2, D)
    out.index_add_(0, i + 2, x[i])
    return (out, x[(i + 1) % T].sum(0))


def listsum(x: Tensor, m: Tensor) -> Any:
    tot = 0
    for r in x.unbind(0):
        if r.sum() > 0:
            tot = tot + r
    return tot + x[0]


def loopbody_reuse(x: Tensor, m: Tensor) -> Any:
    out = x.clone()
    for i in m.nonzero().flatten():
        t = out[i].sum()
        out = out * 0.5
        out[i] = t
    return out


def attr_dyn(x: Tensor, m: Tensor) -> Any:
    d = {"a": x}
    if m.any():
        y = d["a"] + 1
    else:
        y = d["a"]
    d["b"] = y
    return d["b"]


def closure_write(x: Tensor, m: Tensor) -> Any:
    st = [x]

    def bump():
        st[0] = st[0] + 1
        return st[0]

    if m.any():
        z = bump()
    else:
        z = x
    return st[0] + z


def pop(x: Tensor, m: Tensor) -> Any:
    st = [x, x + 1]
    if m.any():
        z = st.pop()
    else:
        z = x
    return z + len(st)


def anyloop(x: Tensor, m: Tensor) -> Any:
    while m.any():
        x = x + 1
        m = torch.zeros_like(m)
    return x


def nan_guard(x: Tensor, m: Tensor) -> Any:
    r = x / 0.0
    out = x.clone()
    out[m] = torch.nan_to_num(r[m])
    s = out.clone()
    s[~m] = 0
    return (out, s)


def mean_rows(x: Tensor, m: Tensor) -> Any:
    return (x[m].mean(0), x[m].sum(), x[m].mean(), x[m].any(), (x[m] > 0).all(), x[m].sum(-1).sum())


def tensor_cond_index(x: Tensor, m: Tensor) -> Any:
    b = (x > 0).float()
    return (x[b.bool()].sum(), b)


def or_short(x: Tensor, m: Tensor) -> Any:
    y = None
    if y is None or y.any():
        x = x + 1
    if m.any() and x.shape[0] > 3:
        x = x * 2
    return x


def aug_int_loop(x: Tensor, m: Tensor) -> Any:
    start = 0
    outs = torch.zeros_like(x)
    for n in [m.sum().item(), (~m).sum().item()]:
        outs[start : start + n] = x[start : start + n] * n
        start += n
    return outs


def globmask(x: Tensor, m: Tensor) -> Any:
    x.masked_fill_(m[:, None], 1.0)
    r = x[m]
    x[~m] = 2.0
    y = torch.zeros_like(x)
    y[m] = r
    return (y, x)


def row_is_a_copy(x: Tensor, m: Tensor) -> Any:
    """A tensor of one element as an index copies, and keeps the dimension."""
    y = x.clone()
    out = torch.zeros(D)
    for row in m.nonzero():
        part = y[row]
        part.add_(1)
        y[row].mul_(3)
        out += part[0] * part.shape[0]
    return (y, out)


def scaled_then_written(x: Tensor, m: Tensor) -> Any:
    """The rows were read before `y` is cleared, and are multiplied at once."""
    slot, token = torch.where(torch.stack([m, x[:, 0] > 0]))
    y, weights = x.clone(), x[:, :2].sigmoid()
    rows = y[token] * weights[token, slot, None]
    y.zero_()
    return torch.zeros(T, D).index_add_(0, token, rows)


def rounded_rows(x: Tensor, m: Tensor) -> Any:
    """A product that is cast, and then used: the cast rounds."""
    slot, token = torch.where(torch.stack([m, ~m]))
    rows = (x[token] * x[:, :2].sigmoid()[token, slot, None]).to(torch.bfloat16)
    out = torch.zeros(T, D, dtype=torch.bfloat16).index_add_(0, token, rows)
    return (out, torch.zeros(T, D).index_add_(0, token, rows.float().exp()))


TRAPS = [
    mask_changed,
    alias_source,
    alias_rows_view,
    inplace_on_rows,
    inplace_chunk,
    carried,
    count_hits,
    nested_fn,
    default_arg,
    int_mask_index,
    bool_list,
    setcol,
    wherescalar,
    twice,
    twice_indexadd,
    half,
    ifelse_alias,
    if_inplace_arg,
    deep,
    returns_early,
    py_number_result,
    intfloat,
    floor_mod,
    cmp_numbers,
    where_1d_of_2d,
    perm_gather,
    shifted_index,
    listsum,
    loopbody_reuse,
    attr_dyn,
    closure_write,
    pop,
    anyloop,
    nan_guard,
    mean_rows,
    tensor_cond_index,
    or_short,
    aug_int_loop,
    globmask,
    row_is_a_copy,
    scaled_then_written,
    rounded_rows,
]
