"""The adapters against the FlashInfer that is installed: every call binds, and its gates are still the ones we state.

Needs flashinfer-python and no GPU; see CONTRIBUTING.md for the environments. Nothing is launched.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sm12x_compile.arch import CARDS
from sm12x_compile.lowering.flashinfer import decode, delta_rule, experts, installed, latent, pages, plans

from .cases import CASES, Case
from .check import check
from .stand_ins import ENTRIES, Bound

if importlib.util.find_spec("flashinfer") is None or importlib.util.find_spec("tvm_ffi") is None:
    pytest.skip("flashinfer-python and apache-tvm-ffi are not installed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory) -> None:
    """FlashInfer writes a log when it is imported, and wants to know for which cards it shall compile."""
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(tmp_path_factory.mktemp("flashinfer")))
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "12.0a")


def package() -> Path:
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def text(place: str) -> str:
    return (package() / place).read_text()


def unbound(place: str, name: str) -> Any:
    """A function of a module that does not import here, with its signature alone."""
    found = next(n for n in ast.walk(ast.parse(text(place))) if isinstance(n, ast.FunctionDef) and n.name == name)
    stub = ast.FunctionDef(name=name, args=found.args, body=[ast.Pass()], decorator_list=[], returns=None)
    for argument in ast.walk(stub):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    nothing = ast.Constant(None)
    stub.args.defaults = [nothing for _ in stub.args.defaults]
    stub.args.kw_defaults = [d and nothing for d in stub.args.kw_defaults]
    scope: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), place, "exec"), scope)  # type: ignore[arg-type]
    return scope[name]


def real(target: str) -> Any:
    """FlashInfer's own; its signature alone where the module does not import without the CuTe DSL or a GPU."""
    module, name = target.split(":")
    place = module.replace(".", "/").removeprefix("flashinfer/") + ".py"
    try:
        return installed.entry(target)
    except RuntimeError:
        if not (package() / place).exists():
            raise
        if re.search(rf"^class {name}\b", text(place), re.MULTILINE):
            return lambda **fields: None
        return unbound(place, name)


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_call_binds(case: Case, enter: Callable[[dict[str, Any]], None]) -> None:
    seen: list[str] = []
    bound = {target: Bound(real(target), stand_in, seen, target) for target, stand_in in ENTRIES.items()}
    enter(bound)
    check(case)
    assert seen


def test_an_argument_that_does_not_exist_is_found() -> None:
    target = "flashinfer.decode:xqa_batch_decode_with_kv_cache"
    needed = dict.fromkeys(("query", "kv_cache", "workspace_buffer", "block_tables", "seq_lens", "max_seq_len"))
    Bound(real(target), lambda **_: None, [], target)(**needed)
    with pytest.raises(TypeError, match="no_such"):
        Bound(real(target), lambda **_: None, [], target)(**needed, no_such=1)


def test_release_is_one_that_we_accept() -> None:
    assert installed.release() is not None and installed.release() >= installed.OLDEST
    arch = SimpleNamespace(family="sm12x", name="rtx5090")
    refusal = installed.refusal(arch, ("sm12x",), needs_nvcc=False)  # type: ignore[arg-type]
    assert refusal is None


# ---------------------------------------------------------------- gates


def xqa_spec(**changed: Any) -> Any:
    from flashinfer.jit.xqa import gen_xqa_module

    given = dict(
        input_dtype=torch.bfloat16, kv_cache_dtype=torch.bfloat16, page_size=64, head_dim=128, head_group_ratio=4,
        use_sliding_window=False, output_dtype=torch.bfloat16,
    )  # fmt: skip
    return gen_xqa_module(**{**given, **changed})


def test_xqa_takes_what_we_say() -> None:
    for page in pages.PAGES:
        xqa_spec(page_size=page)
    for dtype in decode.DTYPES:
        xqa_spec(input_dtype=dtype, kv_cache_dtype=dtype, output_dtype=dtype)
    for head_dim, group in ((16, 1), (96, decode.MAX_GROUP), (512, decode.MAX_GROUP_WIDE)):
        xqa_spec(head_dim=head_dim, head_group_ratio=group)


def test_xqa_refuses_what_we_say() -> None:
    wide = dict(head_dim=272, head_group_ratio=decode.MAX_GROUP_WIDE + 1)
    for change in (dict(page_size=8), dict(page_size=256), dict(head_dim=528), dict(head_dim=72), wide,
                   dict(input_dtype=torch.float32)):  # fmt: skip
        with pytest.raises(ValueError):
            xqa_spec(**change)


def test_xqa_shares_a_head_among_no_more_than_we_say() -> None:
    source = text("data/csrc/xqa/mha.cu")
    limits = set(map(int, re.findall(r"static_assert\(nbValidRows <= (\d+)u\)", source)))
    assert limits == {decode.MAX_GROUP}


def test_workspace_of_xqa_is_divided_as_we_think() -> None:
    source = inspect.getsource(inspect.unwrap(installed.entry("flashinfer.decode:xqa_batch_decode_with_kv_cache")))
    assert "semaphore = workspace_u8[: 8 * 1024 * 1024]" in source
    assert "q_scale_value = bmm1_scale / kv_scale_value * (head_dim**0.5)" in source  # 1/sqrt(D) is in the kernel
    assert "sliding_win_size=window_left + 1 if window_left >= 0 else 0" in source
    kernel = text("data/csrc/xqa/mha.cu")
    assert "multiProcessorCount / (batchSize * nbKHeads)" in kernel and "&semaphores[idxSeq]" in kernel
    assert decode._SEMAPHORE_BYTES == latent._SEMAPHORE_BYTES == 8 << 20


MAJORS = {"sm8x": 8, "sm9x": 9, "sm10x": 10, "sm12x": 12}


def test_xqa_runs_on_the_cards_that_we_say() -> None:
    gate = r"get_compute_capability\(torch\.device\(device=\"cuda\"\)\)\[0\] not in \[([\d, ]+)\]:\n        raise"
    gates = re.findall(gate, text("xqa.py"))
    majors = [set(map(int, gate.split(","))) for gate in gates]
    assert majors == [{MAJORS[f] for f in decode.FAMILIES}, {MAJORS[f] for f in latent.XQA_FAMILIES}]
    assert "supported_major_versions=[9, 10, 12]" in text("jit/xqa.py")


def test_latent_xqa_wants_the_heads_that_we_say() -> None:
    assert re.findall(r"head_group_ratio != (\d+)", text("xqa.py")) == [str(latent.XQA_HEADS)]


def test_sinks_wrapper_is_built_as_we_use_it() -> None:
    wrapper = installed.entry("flashinfer.attention:BatchAttentionWithAttentionSinkWrapper")
    source = inspect.getsource(wrapper.__init__)
    assert '["sink"],  # additional_tensor_names' in source and '["sm_scale"],  # additional_scalar_names' in source
    assert "use_logits_soft_cap" not in source  # the variant has none: a call with both is refused


def test_fa2_is_not_bound_to_a_card() -> None:
    source = inspect.getsource(inspect.unwrap(installed.entry("flashinfer.utils:determine_attention_backend")))
    assert 'return "fa2"' in source
    assert plans.WORKSPACE_BYTES >= 128 << 20


def test_causal_tile_of_latent_fa2() -> None:
    place = package() / "mla" / "_batch_mla" / "_backends" / "_fa_common.py"
    if not place.exists():
        pytest.skip("this release does not check the tile; its kernel is the same")
    assert "tile_q = 64 * (2 if" in place.read_text() and latent.TILE_Q == 128


def test_latent_fa3_is_made_for_the_cards_that_we_say() -> None:
    """Its build asks for Hopper's own instructions; a tile has 64 rows."""
    from flashinfer.jit.attention.modules import gen_batch_mla_module

    source = inspect.getsource(inspect.unwrap(gen_batch_mla_module))
    assert 'backend == "fa3"' in source and "sm90a_nvcc_flags" in source and latent.FA3_FAMILIES == ("sm9x",)
    row = re.search(r"constexpr uint32_t CTA_TILE_Q = (\d+)", text("data/include/flashinfer/attention/mla_hopper.cuh"))
    assert row is not None and int(row[1]) == latent.FA3_ROWS


def test_delta_rule_runs_on_the_cards_that_we_say() -> None:
    source = text("gdn_prefill.py")
    for family in delta_rule.FAMILIES:
        assert re.search(rf"_arch_major == {MAJORS[family]}\b", source), family
    assert "Forget gate (alpha)" in source and "[N, H, V, K]" in source


def test_delta_rule_has_the_head_dim_that_we_say() -> None:
    sources = [p.read_text() for p in (package() / "gdn_kernels").rglob("delta_rule_sm120.py")]
    assert sources, "the kernel of SM12x is not in this release"
    assert any(re.search(rf"\b{delta_rule.HEAD_DIM}\b", s) for s in sources)


def test_b12x_runs_on_the_cards_that_we_say() -> None:
    source = text("fused_moe/cute_dsl/b12x_moe.py")
    gates = set(re.findall(r"@supported_compute_capability\(\[([\d, ]+)\]\)", source))
    assert gates == {"120, 121"} and experts.FAMILIES == ("sm12x",)
    assert f"get_cuda_version().major < {experts.CUDA}" in source


def test_b12x_takes_the_activation_that_we_say() -> None:
    source = text("fused_moe/cute_dsl/blackwell_sm12x/moe_w4a16_activations.py")
    assert 'SUPPORTED_MOE_ACTIVATIONS = frozenset({"silu", "relu2"})' in source


B12X = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"


@pytest.fixture
def packer(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's own packing, which asks the card for a workspace that is not packed."""
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed")
    module = importlib.import_module(f"{B12X}.moe_w4a16_prepare")
    monkeypatch.setattr(module, "_make_workspace", lambda device, max_blocks_per_sm: torch.zeros(1))


def test_packing_of_experts_has_the_shapes_that_we_say(packer: None) -> None:
    a = next(case for case in CASES if case.name == "b12x_moe: interleaved").call().arguments
    weights = (a["w13"], a["w13_scale"], a["w2"], a["w2_scale"])
    found, fake = experts._pack(*weights, True), experts._pack_fake(*weights, True)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in fake]


def test_packing_of_experts_moves_every_number_once(packer: None) -> None:
    """Gate and up in turn are packed like halves, and no four bits are lost or doubled."""
    a = next(case for case in CASES if case.name == "b12x_moe: halves").call().arguments
    w13, scale, w2, w2_scale = a["w13"], a["w13_scale"], a["w2"], a["w2_scale"]
    packed = experts._pack(w13, scale, w2, w2_scale, False)
    turns = [t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for t in (w13, scale)]
    assert all(torch.equal(x, y) for x, y in zip(packed, experts._pack(*turns, w2, w2_scale, True), strict=True))
    for original, words in ((w13, packed[0]), (w2, packed[3])):
        nibbles = [torch.stack([t.view(torch.uint8) & 15, t.view(torch.uint8) >> 4]) for t in (original, words)]
        counts = [torch.stack([torch.bincount(n[:, e].flatten(), minlength=16) for e in range(4)]) for n in nibbles]
        assert torch.equal(*counts)
    for original, moved in ((scale, packed[1]), (w2_scale, packed[4])):
        assert torch.equal(original.flatten(1).sort().values, moved.flatten(1).sort().values)


@pytest.mark.parametrize("rows", [1, 8, 64, 2048])
@pytest.mark.parametrize("hidden, inner", [(2048, 768), (4096, 1536), (7168, 2048)])
def test_b12x_has_a_tile_that_fits(hidden: int, inner: int, rows: int) -> None:
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed")
    select = importlib.import_module(f"{B12X}.moe_w4a16_kernel")._select_tile_config
    card = CARDS["rtx5090"]
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        tile = select(
            problem_m=rows, problem_n=n, problem_k=k, top_k=8, moe_block_size=16, sms=card.sm_count,
            max_shared_mem=card.smem_per_block, scale_format="e8m0_k32", weight_layout="packed",
        )  # fmt: skip
        assert tile


# ---------------------------------------------------------------- why some are not used


@pytest.mark.parametrize(
    "name", ["gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"]
)
def test_steps_of_the_delta_rule_still_take_raw_projections(name: str) -> None:
    """Once one of them takes a decay and a rate, `declined.py` is out of date."""
    parameters = set(inspect.signature(unbound("gdn_decode.py", name)).parameters)
    assert {"A_log", "a", "dt_bias", "b"} <= parameters and not {"g", "beta"} & parameters


def test_cutlass_still_has_no_bf16_rows_on_these_cards() -> None:
    source = text("fused_moe/api.py")
    if "_CUTLASS_W4A16_ARCHS" not in source:
        pytest.skip("this release names no cards")
    assert "_CUTLASS_W4A16_ARCHS = (90,)" in source


def test_plain_fa2_still_ignores_sinks() -> None:
    """`run(sinks=...)` reaches the kernels of trtllm-gen and no other, so the adapter must not use it."""
    source = text("prefill.py")
    trtllm = source.index("sinks=sinks")
    branch = source[source.index('elif backend == "fa2":', trtllm) + 1 :]
    fa2 = re.split(r"\n        el(?:se|if)\b", branch)[0]
    assert "paged_run_func(" in fa2 or "paged_run(" in fa2
    assert "sinks" not in fa2


def test_version_is_what_the_metadata_says() -> None:
    assert importlib.metadata.version("flashinfer-python").startswith(installed.named(installed.release() or ()))
