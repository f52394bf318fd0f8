"""Reading a near-miss: what the report says of code that looks like attention and must stay as it is."""

import torch
from torch import Tensor

import sm12x_compile


def scaled_too_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scale stands after the softmax: a different function, left as it is."""
    return (torch.softmax(q @ k.transpose(-2, -1), dim=-1) * 0.25) @ v


def over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(dim=-2): the weights of one query don't add up to one."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-2) @ v


def weights_wanted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The caller wants the attention weights, which a fused kernel never has in memory."""
    weights = torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1)
    return weights @ v, weights


q, k, v = (torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
for function in (scaled_too_late, over_the_queries, weights_wanted):
    report = sm12x_compile.explain(function, q, k, v, options={"codegen": "eager"})
    print(f"--- {function.__name__}: {function.__doc__}")
    for site in report.sites:
        print(f"{site.status}: {site.reason}\n  at {site.source}\n  read before that: {site.tags}")
    # A near-miss is never rewritten: the numbers are those of the code as written.
    assert not report.rewritten
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="sm12x", options={"codegen": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v))

# In a test of your own: this fails, and its message lists the near-misses.
try:
    sm12x_compile.assert_rewritten(over_the_queries, (q, k, v), attention=1)
except AssertionError as error:
    print(f"--- assert_rewritten says:\n{error}")
else:
    raise SystemExit("expected a near-miss")
