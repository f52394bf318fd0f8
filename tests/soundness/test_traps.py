"""Traps of memory and state: aliases, writes, weights that change between calls. Runs first in CI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest import fixture, mark
from torch import Tensor, nn

import sm12x_compile

from .trapping import (
    SelfAttention,
    attend,
    attention_count,
    causal,
    check,
    compiled,
    heads,
)


@fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


# Aliases


def test_same_tensor_three_times():
    (x,) = heads(count=1)
    check(attend, (x, x, x), sites=1)


def test_same_tensor_then_different_ones():
    q, k, v = heads()
    check(attend, (q, q, q), (q, k, v), (q, k, k))


def overlapping() -> tuple[Tensor, Tensor]:
    buffer = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(3))
    return buffer[:, :, :5], buffer[:, :, 2:7]


def test_overlapping_inputs_only_read():
    check(lambda q, k: attend(q, k, k), (overlapping()))


@mark.parametrize("codegen", ["eager", "inductor"])
def test_a_written_input_is_returned_whole(codegen):
    """``x.to(x.device)`` is x itself, as a cache's counter that is moved to where it is."""

    def function(q, k, count):
        same, moved = k.contiguous(), count.to(q.device)
        k.mul_(2.0)
        count.add_(1)
        return attend(q, same, k), same, moved, count

    q, k = heads(count=2)
    check(function, (q, k, torch.tensor(3)), (k, q, torch.tensor(4)), sites=1, codegen=codegen)


def test_overlapping_inputs_written_between_two_reads():
    def function(q, k):
        first = attend(q, k, k)
        q.mul_(2.0)  # also rows 0 to 2 of k
        return first, attend(q, k, k)

    check(function, overlapping())


def test_write_through_a_view_of_another_input():
    def function(base, view):
        scores = base @ view.mT
        base.zero_()
        return scores.softmax(-1) @ view

    base = heads(count=1)[0]
    check(function, (base, base[:, :, :3]))
    check(function, (base, base.transpose(0, 1)))


def test_keys_and_values_in_one_storage():
    def function(q, k, v):
        k.add_(1.0)
        return attend(q, k, v)

    kv = torch.randn(2, 2, 2, 5, 4)
    check(function, (heads()[0], kv[0], kv[1]))
    check(function, (heads()[0], kv[0], kv.flip(0)[1]))


def test_output_is_a_mutated_input():
    def function(q, k, cache, position):
        cache.index_copy_(2, position, k)
        return attend(q, cache, cache), cache

    q, k, _ = heads(S=1)
    check(function, (q, k, torch.zeros(2, 2, 6, 4), torch.tensor([2])))


def test_output_is_a_view_of_a_mutated_input():
    def function(q, k, cache):
        cache[:, :, 1:2] = k
        return attend(q, cache, cache), cache[:, :, :3], cache.transpose(1, 2)

    q, k, _ = heads(S=1)
    cache = torch.zeros(2, 2, 6, 4)
    check(function, (q, k, cache))
    # The view that comes back is alive: a write through it must reach the cache.
    out = compiled(function)(q, k, cache)
    out[1].fill_(7.0)
    assert bool((cache[:, :, :3] == 7.0).all())


def test_output_is_a_view_of_an_input_only_read():
    check(lambda q, k, v: (attend(q, k, v), k[:, :1], v.mT, q), heads())


def test_outputs_share_memory_with_each_other():
    def function(q, k, v):
        out = attend(q, k, v)
        return out, out.transpose(1, 2), out[:, :1], out

    check(function, heads())


def test_argument_written_after_it_was_read():
    def function(q, k, v):
        out = attend(q, k, v)
        k.zero_()
        v[..., 0] = 1.0
        return out

    check(function, heads())


def test_keys_written_between_scores_and_values():
    def function(q, k):
        weights = (q @ k.mT).softmax(-1)
        k.mul_(3.0)
        return weights @ k

    check(function, heads(count=2))


def test_buffer_read_before_and_after_a_write():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(5)))

        def forward(self, q, k):
            before = attend(q, self.cache, self.cache)
            self.cache[:, :, 3:4] = k
            return before, attend(q, self.cache, self.cache)

    q, k, _ = heads(S=1)
    check(Twice(), (q, k), (k, q))


def test_mask_written_between_two_reads():
    def function(q, k, v, mask):
        first = attend(q, k, v, mask)
        mask.logical_not_()
        return first, attend(q, k, v, mask)

    check(function, (*heads(), causal(5)))


def test_result_of_an_earlier_call_stays():
    function = compiled(attend)
    first = function(*heads(seed=1))
    kept = first.clone()
    second = function(*heads(seed=2))
    second.zero_()
    assert torch.equal(first, kept)


def test_result_has_the_strides_of_eager():
    # After a graph break the user's own `.view` depends on them.
    def function(q, k, v):
        return attend(q, k, v), F.scaled_dot_product_attention(q, k, v)

    for inputs in (heads(), tuple(x.transpose(1, 2) for x in heads())):
        torch._dynamo.reset()
        eager, ours = function(*inputs), compiled(function)(*inputs)
        assert [x.stride() for x in ours] == [x.stride() for x in eager]


def test_view_of_the_result_inside_the_graph():
    # The trace turned the user's reshape into a view, by the strides that the original op would have given.
    def function(q, k, v):
        return attend(q, k, v).flatten(1), F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    tokens_first = tuple(x.transpose(1, 2) for x in heads())
    fused = (
        torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(6))
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    for inputs in (heads(), tokens_first, fused):
        check(function, inputs, sites=2)
        check(function, inputs, sites=2, codegen="inductor")
    mask = torch.tensor([[True, False, True, True, True]])
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2), fused)


# Inputs of unusual layout


@mark.parametrize("codegen", ["eager", "inductor"])
def test_layouts(codegen: str):
    base = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(2))
    transposed = base.transpose(1, 2)
    strided = torch.randn(2, 2, 10, 8, generator=torch.Generator().manual_seed(3))[:, :, ::2, ::2]
    row = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(4))
    shifted = torch.arange(81.0).div(40)[1:].view(2, 2, 5, 4)  # not aligned to 16 bytes
    check(attend, (transposed,) * 3, sites=1, codegen=codegen)
    check(attend, (strided, *heads()[1:]), sites=1, codegen=codegen)
    check(attend, (heads()[0], row.expand(2, 2, 5, 4), row.expand(2, 2, 5, 4)), codegen=codegen)
    check(attend, (shifted, shifted + 1, shifted - 1), codegen=codegen)


def test_strides_that_change_between_calls():
    plain = heads()
    turned = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain)
    check(attend, plain, turned, plain)


@mark.parametrize("empty", ["B", "H", "S", "D"])
def test_empty_inputs(empty: str):
    check(attend, heads(**{empty: 0}))


def test_no_keys_at_all():
    q, k, v = heads()
    check(attend, (q, k[:, :, :0], v[:, :, :0]))
    check(F.scaled_dot_product_attention, (q, k[:, :, :0], v[:, :, :0]))


# Weights and state that change between calls


def test_one_compile_for_several_layers():
    layers = [SelfAttention() for _ in range(3)]
    x = torch.randn(2, 5, 8)
    step = compiled(lambda layer, x: layer(x))
    with sm12x_compile.collect() as report:
        for layer in layers:
            torch.testing.assert_close(step(layer, x), layer(x))
    assert attention_count(report) == report.graphs >= 1


def test_layers_compiled_in_place():
    model = nn.Sequential(*(SelfAttention() for _ in range(3)))
    x = torch.randn(2, 5, 8)
    expected = model(x)
    for layer in model:
        layer.compile(backend=sm12x_compile.sm12x, options={"codegen": "eager"})
    torch.testing.assert_close(model(x), expected)


def change_by_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})


def change_by_assigning_state(model: nn.Module) -> None:
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)


def change_by_data(model: nn.Module) -> None:
    model.qkv.weight.data = torch.randn_like(model.qkv.weight)


def change_in_place(model: nn.Module) -> None:
    model.qkv.weight.mul_(-2.0)
    model.out.bias[1:3].add_(1.0)


def change_by_new_parameter(model: nn.Module) -> None:
    model.qkv.weight = nn.Parameter(torch.randn_like(model.qkv.weight))


def change_by_merging_lora(model: nn.Module) -> None:
    model.qkv.weight += torch.randn(24, 2) @ torch.randn(2, 8)


@mark.parametrize("codegen", ["eager", "inductor"])
@mark.parametrize(
    "change",
    [change_by_load_state_dict, change_by_assigning_state, change_by_data, change_in_place,
     change_by_new_parameter, change_by_merging_lora],
)  # fmt: skip
def test_weights_that_change(change, codegen: str):
    model, x = SelfAttention(), torch.randn(2, 5, 8)
    step = compiled(model, codegen=codegen)
    before = step(x)
    torch.testing.assert_close(before, model(x))
    change(model)
    expected = model(x)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(step(x), expected)


def test_mask_buffer_that_is_overwritten():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", causal(9))

        def forward(self, q, k, v):
            n = q.shape[2]
            return attend(q, k, v, self.mask[:n, :n])

    model = Masked()
    step = compiled(model)
    with sm12x_compile.collect() as report:
        torch.testing.assert_close(step(*heads()), model(*heads()))
        model.mask.copy_(causal(9).mT)
        torch.testing.assert_close(step(*heads()), model(*heads()))
        model.mask = torch.eye(9, dtype=torch.bool)
        torch.testing.assert_close(step(*heads()), model(*heads()))
    assert attention_count(report) >= 1
    assert all(site.tags["mask"] == "dense" for site in report.rewritten), str(report)


def test_tensor_closed_over():
    mask = causal(5)
    step = compiled(lambda q, k, v: attend(q, k, v, mask))
    torch.testing.assert_close(step(*heads()), attend(*heads(), causal(5)))
    mask[1, 0] = False
    torch.testing.assert_close(step(*heads()), attend(*heads(), mask))


def test_numbers_that_change():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.window = 0.5, 3
            self.register_buffer("temperature", torch.tensor(2.0))
            self.sinks = nn.Parameter(torch.randn(2))

        def forward(self, q, k, v):
            n = q.shape[2]
            distance = torch.arange(n)[:, None] - torch.arange(n)
            s = (q @ k.mT) * self.scale / self.temperature
            s = s.masked_fill((distance < 0) | (distance >= self.window), float("-inf"))
            s = torch.cat((s, self.sinks[None, :, None, None].expand(*s.shape[:-1], 1)), dim=-1)
            return s.softmax(-1)[..., :-1] @ v

    model = Scaled()
    step = compiled(model)

    def same() -> None:
        torch.testing.assert_close(step(*heads()), model(*heads()))

    same()
    model.scale = -1.5
    same()
    model.window = 2
    same()
    model.temperature.fill_(0.7)
    same()
    model.sinks.data.add_(3.0)
    same()


def test_hook_that_keeps_the_weights():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, q, k, v):
            return self.softmax(q @ k.mT) @ v

    model = Hooked()
    seen: list[Tensor] = []
    model.softmax.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = model(*heads())
    out = compiled(model)(*heads())
    torch.testing.assert_close(out, expected)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])


def test_a_float_of_python_under_dynamic():
    """`dynamic=True` turns a module's floats into inputs; one that is read off must be guarded."""

    class Scaled(nn.Module):
        scaling = 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * self.scaling).softmax(-1) @ v

    module = Scaled()
    module.scaling = 0.3
    compiled = torch.compile(module, backend=sm12x_compile.sm12x, options={"codegen": "eager"}, dynamic=True)
    with torch.no_grad(), sm12x_compile.collect() as report:
        for scaling in (0.3, 0.7, 0.3):
            module.scaling = scaling
            for length in (5, 9):
                inputs = heads(S=length)
                torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert attention_count(report) == report.graphs == 2 and not report.warnings
