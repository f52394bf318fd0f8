"""Graphs of tensors on a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


class Tracer:
    """Fake tensors of one mode, and graphs of functions of them."""

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)

    def tensor(
        self, *shape: int, device: str = "cuda", dtype: torch.dtype = torch.float32, dynamic: int = -1
    ) -> Tensor:
        """A fake tensor; `dynamic` is a dim whose size is symbolic."""
        dims = [DimDynamic.DYNAMIC if d == dynamic else DimDynamic.STATIC for d in range(len(shape))]
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        real = torch.empty(shape, dtype=dtype, device="meta")
        fake = self.mode.from_tensor(real, symbolic_context=context)
        with self.mode:
            made: Tensor = torch.empty_strided(fake.shape, fake.stride(), dtype=dtype, device=device)
        return made

    def number(self, hint: int = 5) -> Any:
        """A symbolic int."""
        from torch._dynamo.source import ConstantSource

        source = ConstantSource(f"n{len(self.shapes.var_to_val)}")
        symbol = self.shapes.create_unspecified_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        return self.shapes.create_symintnode(symbol, hint=hint, source=source)

    def unbacked(self) -> Any:
        """An int that only the device knows."""
        return self.shapes.create_unbacked_symint()

    def step(self, target: Any, value: Any, *args: Any) -> GraphModule:
        """A graph of one call with the given fake result: for operators that only a real GPU can trace."""
        graph = torch.fx.Graph()

        def placeholder(operand: Any) -> Any:
            node = graph.placeholder(f"x{len(graph.nodes)}")
            node.meta["val"] = operand
            return node

        call = graph.call_function(target, pytree.tree_map_only(Tensor, placeholder, args))
        call.meta["val"] = value
        after = graph.call_function(torch.ops.aten.mul.Tensor, (call, 2))
        after.meta["val"] = value
        graph.output((after,))
        return GraphModule(torch.nn.Module(), graph)

    def graph(self, function: Callable[..., Any], *args: Any, pre_dispatch: bool = True) -> GraphModule:
        """Pre-dispatch ATen, as our normal form has it, or decomposed, as Inductor gets it."""
        from torch._inductor.decomposition import select_decomp_table

        with self.mode, torch.no_grad():
            traced: GraphModule = make_fx(
                function, None if pre_dispatch else select_decomp_table(), "real", pre_dispatch=pre_dispatch,
                _allow_non_fake_inputs=True,
            )(*args)  # fmt: skip
        return traced
