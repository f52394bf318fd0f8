"""One's own op, pattern and kernel, from outside the package: RMS normalisation.

1. An op says what is computed: an eager reference, which is also the fallback, and a fake for the shape.
2. A pattern recognises it in the normal form and answers with a `Rewrite`, a `Refusal` or None.
3. A kernel says which calls it accepts, and why not the others; the report keeps every no.
"""

import torch
from torch import Tensor, nn
from torch.fx import Node

import sm12x_compile
from sm12x_compile import register_kernel, register_pattern
from sm12x_compile.arch import Arch
from sm12x_compile.match import GraphView, Refusal, Rewrite
from sm12x_compile.ops import semantic_op
from sm12x_compile.registry import YES, Call, No

aten = torch.ops.aten


@semantic_op(fake=lambda x, eps: torch.empty_like(x))
def rms_unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) along the last dim, any floating dtype."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@register_pattern("rms_unit", anchors=[aten.rsqrt.default])
def find_rms_unit(anchor: Node, graph: GraphView) -> Rewrite | Refusal | None:
    """Called for every rsqrt: the op that this family cannot be written without."""
    match anchor.args[0]:
        case Node(target=aten.add.Tensor, args=(Node(target=aten.mean.dim, args=(power, *dims)), float(eps))):
            pass
        case _:
            return None  # not our business
    if power.target is not aten.pow.Tensor_Scalar or power.args[1] != 2:
        return None
    x = power.args[0]
    if dims != [[-1], True]:
        return Refusal("the mean is not over the last dim alone", anchor)
    product, *others = anchor.users
    if others or product.target is not aten.mul.Tensor or set(product.args) != {x, anchor}:
        return Refusal("the reciprocal root is not just multiplied with the tensor it came from", anchor)
    with graph.graph.inserting_before(product):
        call = graph.call(torch.ops.sm12x.rms_unit.default, x, eps)
    return Rewrite(product, call, call, {"eps": eps})


def accepts(call: Call, arch: Arch) -> type(YES) | No:
    width = call.x.shape[-1]
    return YES if call.hint(width) % 32 == 0 else No(f"needs a width that 32 divides, got {width}")


# inline: traced into the graph, where Inductor can fuse it; otherwise an opaque op
@register_kernel("rms_unit", "mine.one_pass", accepts=accepts, inline=True)
def one_pass(x: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), eps=eps)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


for width, kernel in ((64, "mine.one_pass"), (40, "reference")):
    model, x = Norm(width).eval(), torch.randn(3, width)
    report = sm12x_compile.assert_rewritten(model, x, options={"codegen": "eager"}, rms_unit=1)
    print(report)
    assert report.rewritten[0].kernel == kernel
    with torch.no_grad():
        compiled = torch.compile(model, backend="sm12x", options={"codegen": "eager"})
        torch.testing.assert_close(compiled(x), model(x))
