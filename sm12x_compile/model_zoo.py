"""Tiny Hugging Face models with random weights, built from config: for the demo, the CLI and the tests.

Nothing is downloaded. A family's name here is data: it picks a config class and never decides a match. The
sizes are chosen so that a wrong rewrite shows: weights are large enough for the softmax to be far from
uniform, windows are shorter than the sequence, softcaps bite, and a mixture of experts routes to every
expert, so that a rounding difference cannot change the routing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Transformers reads this while it is imported; a zoo of random weights has nothing to ask a hub for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Kind = Literal["decoder", "encoder", "text2text", "speech2text", "vision"]
Phase = Literal["prefill", "decode", "static"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "static")

VOCAB = 256
WINDOW = 8
_INSTALL = 'pip install "sm12x-compile[hf]"  (or: pip install "transformers>=5.17,<5.24")'


class ZooError(RuntimeError):
    """The model cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Family:
    """A model family: its config class by name, and the settings that make it tiny.

    Attributes:
        name: what the user types, e.g. ``llama``.
        kind: decides the auto class and which inputs the model takes.
        config: keyword arguments of the config.
        layers: names of the config fields that hold the number of layers.
    """

    name: str
    kind: Kind
    config: dict[str, Any]
    layers: tuple[str, ...] = ("num_hidden_layers",)
    config_name: str | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return PHASES if self.kind in ("decoder", "text2text", "speech2text") else ("prefill",)

    @property
    def encoder_decoder(self) -> bool:
        return self.kind in ("text2text", "speech2text")


# 1 / sqrt(hidden_size) keeps activations near one through a linear layer.
_DECODER: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.125,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_ENCODER: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.125,
)  # fmt: skip
_HYBRID = ["sliding_attention", "full_attention"]


def _decoder(name: str, config_name: str | None = None, **changes: Any) -> Family:
    return Family(name, "decoder", {**_DECODER, **changes}, config_name=config_name)


_MODERNBERT: dict[str, Any] = dict(
    initializer_cutoff_factor=3.0, local_attention=WINDOW, layer_types=_HYBRID[::-1],
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
_GPT2: dict[str, Any] = dict(
    vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.125,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_T5: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
_WHISPER: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8,
    max_source_positions=24, max_target_positions=64, init_std=0.125, suppress_tokens=None,
    begin_suppress_tokens=None, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip
# Latent attention: head_dim is the rotary part's.
_LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, head_dim=8, kv_lora_rank=32, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=12, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
# Linear attention: two value heads share one head of q and k; every fourth layer is full attention.
_LINEAR: dict[str, Any] = dict(
    num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=24,
)  # fmt: skip
_SPARSE: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
)  # fmt: skip
_VIT: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32,
    patch_size=8, initializer_range=0.125,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    member.name: member
    for member in (
        _decoder("llama"),
        _decoder("qwen3"),
        _decoder("mistral", sliding_window=WINDOW),
        _decoder("gemma2", sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0,
                 layer_types=_HYBRID),
        _decoder("gemma3", config_name="gemma3_text", sliding_window=WINDOW, query_pre_attn_scalar=16,
                 layer_types=_HYBRID),
        _decoder("phi3"),
        Family("gpt2", "decoder", _GPT2, layers=("n_layer",)),
        _decoder("gpt_oss", sliding_window=WINDOW, layer_types=_HYBRID, num_local_experts=4,
                 num_experts_per_tok=4),
        _decoder("qwen3_moe", num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32,
                 norm_topk_prob=True),
        _decoder("deepseek_v2", **_LATENT),
        _decoder("deepseek_v3", **_LATENT),
        _decoder("deepseek_v32", **_LATENT, index_topk=512, index_head_dim=16, index_n_heads=2),
        _decoder("glm4_moe_lite", **_LATENT),
        _decoder("kimi_linear", **{**_LATENT, "q_lora_rank": None, "n_routed_experts": None}, num_local_experts=4,
                 linear_head_dim=16, linear_num_heads=4, layer_types=["linear_attention", "full_attention"]),
        _decoder("qwen3_next", **_LINEAR, **_SPARSE),
        _decoder("qwen3_5", config_name="qwen3_5_text", **_LINEAR),
        _decoder("qwen3_5_moe", config_name="qwen3_5_moe_text", **_LINEAR, **_SPARSE),
        _decoder("olmo_hybrid", **{**_LINEAR, "linear_num_value_heads": 2}),
        _decoder("mixtral", num_local_experts=4, num_experts_per_tok=4),
        _decoder("olmoe", num_experts=4, num_experts_per_tok=4, norm_topk_prob=False),
        _decoder("phimoe", num_local_experts=4, num_experts_per_tok=2),
        _decoder("glm4_moe", moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                 topk_group=1, first_k_dense_replace=1),
        Family("bert", "encoder", _ENCODER),
        Family("modernbert", "encoder", {**_ENCODER, **_MODERNBERT}),
        Family("t5", "text2text", _T5, layers=("num_layers", "num_decoder_layers")),
        Family("whisper", "speech2text", _WHISPER, layers=("encoder_layers", "decoder_layers")),
        Family("vit", "vision", _VIT),
    )
}  # fmt: skip


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ZooError: there is none; the message lists close names.
    """
    try:
        return FAMILIES[name]
    except KeyError:
        close = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "none is close."
        raise ZooError(f"unknown model {name!r}: {hint} Known: {', '.join(FAMILIES)}") from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ZooError(f"transformers is not installed: {_INSTALL}") from None
    transformers.logging.set_verbosity_error()
    return transformers


def attention_implementations(name: str) -> tuple[str, ...]:
    """Of ``eager`` and ``sdpa``, what the installed transformers offers for this family."""
    transformers = _transformers()
    chosen = family(name)
    config = transformers.AutoConfig.for_model(chosen.config_name or chosen.name, **chosen.config)
    with torch.device("meta"):
        model = _auto_class(transformers, chosen.kind).from_config(config, attn_implementation="eager")
    return ("eager", "sdpa") if model._supports_sdpa else ("eager",)


def build(
    name: str,
    *,
    attn: str | None = None,
    experts: str | None = None,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """A tiny model of the family in eval mode; the same weights for the same arguments, whatever the dtype.

    Args:
        name: a key of `FAMILIES`.
        attn: ``eager`` or ``sdpa``; None lets transformers choose.
        experts: ``eager``, ``batched_mm`` or ``grouped_mm``; None lets transformers choose.
        layers: number of layers (of the encoder and of the decoder).
        changes: fields of the config to set otherwise.

    Raises:
        ZooError: unknown name, transformers missing, or transformers refuses the combination.
    """
    transformers = _transformers()
    chosen = family(name)
    settings = {**chosen.config, **changes}
    if layers is not None:
        settings |= dict.fromkeys(chosen.layers, layers)
        if "layer_types" in settings:
            kinds = chosen.config["layer_types"]
            settings["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    config = transformers.AutoConfig.for_model(chosen.config_name or chosen.name, **settings)
    wanted = {} if attn is None else {"attn_implementation": attn}
    wanted |= {} if experts is None else {"experts_implementation": experts}
    with _seeded(seed):
        try:
            model = _auto_class(transformers, chosen.kind).from_config(config, **wanted)
        except ValueError as error:
            version = transformers.__version__
            raise ZooError(f"transformers {version} refuses {name} with {attn!r}: {error}") from None
        _fill(model)
    model = model.to(device).eval().requires_grad_(False)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32, as when loading
        parameter.data = parameter.data.to(dtype)
    return model


def _auto_class(transformers: Any, kind: Kind) -> Any:
    return {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
        "text2text": transformers.AutoModelForSeq2SeqLM,
        "speech2text": transformers.AutoModelForSpeechSeq2Seq,
        "vision": transformers.AutoModel,
    }[kind]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _fill(model: nn.Module) -> None:
    """Random values where a config leaves zeros or nothing: biases, sinks, position tables."""
    for parameter in model.parameters():
        finite = bool(torch.isfinite(parameter).all())
        if not finite or (parameter.numel() > 1 and not parameter.count_nonzero()):
            nn.init.normal_(parameter, std=0.1)


@dataclass
class Workload:
    """A model, its inputs, and a way to run them from a fresh cache as often as wanted.

    Attributes:
        phase: ``prefill`` (one call, no cache), ``decode`` (DynamicCache: one call for the prompt, then one
            for each new token) or ``static`` (StaticCache: the prompt in plain eager mode, as `generate`
            does, then one call for each new token).
        seq: length of the prompt; an encoder-decoder reads `seq` source and half as many target tokens.
        padding: row i of the batch has i keys masked out: on the left for decoders, else on the right.
    """

    model: nn.Module
    family: Family
    phase: Phase = "prefill"
    batch: int = 1
    seq: int = 12
    steps: int = 3
    padding: bool = False
    seed: int = 1
    _inputs: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.phase not in self.family.phases:
            has = ", ".join(self.family.phases)
            raise ZooError(f"{self.family.name} has no phase {self.phase!r}; it has {has}")
        with _seeded(self.seed):
            self._inputs = self._make_inputs()
            self._tokens = self._ids(self.steps)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _ids(self, length: int) -> Tensor:
        # Ids below 5 are special tokens; none is a pad token unless `padding` asks for it.
        return torch.randint(5, VOCAB, (self.batch, length)).to(self.device)

    def _make_inputs(self) -> dict[str, Tensor]:
        config: Any = self.model.config
        dtype = next(self.model.parameters()).dtype
        if self.family.kind == "vision":
            pixels = torch.randn(self.batch, config.num_channels, config.image_size, config.image_size)
            return {"pixel_values": pixels.to(self.device, dtype)}
        if self.family.kind == "speech2text":
            frames = torch.randn(self.batch, config.num_mel_bins, 2 * config.max_source_positions)
            tokens = self._ids(self.seq // 2)
            return {"input_features": frames.to(self.device, dtype), "decoder_input_ids": tokens}
        inputs = {"input_ids": self._ids(self.seq)}
        if self.padding:
            inputs["attention_mask"] = self._padding_mask()
        if self.family.kind == "text2text":
            inputs["decoder_input_ids"] = self._ids(self.seq // 2)
        return inputs

    def _padding_mask(self) -> Tensor:
        mask = torch.ones(self.batch, self.seq, dtype=torch.int64)
        for row in range(self.batch):
            hidden = slice(0, row) if self.family.kind == "decoder" else slice(self.seq - row, self.seq)
            mask[row, hidden] = 0
        return mask.to(self.device)

    def run(self, forward: Callable[..., Any] | None = None) -> list[Tensor]:
        """The outputs of every call of the phase; `forward` (default: the model) is what makes the calls.

        Tokens are given, not taken from the outputs, so that two runs see the same inputs.
        """
        forward = self.model if forward is None else forward  # a compiled module has no truth value
        with torch.no_grad():
            if self.phase == "prefill":
                return [_first(forward(**self._inputs, **self._no_cache()))]
            cache = self._new_cache()
            first = self.model if self.phase == "static" else forward
            output = first(**self._inputs, past_key_values=cache, use_cache=True)
            outputs = [] if self.phase == "static" else [_first(output)]
            for step in range(self.steps):
                outputs.append(_first(forward(**self._decode_inputs(output, cache, step))))
            return outputs

    def one_call(self) -> dict[str, Any]:
        """Keyword arguments of one call: the prompt for ``prefill``, else the first new token."""
        if self.phase == "prefill":
            return {**self._inputs, **self._no_cache()}
        with torch.no_grad():
            cache = self._new_cache()
            output = self.model(**self._inputs, past_key_values=cache, use_cache=True)
        return self._decode_inputs(output, cache, 0)

    def _no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if "decode" in self.family.phases else {}

    def _decode_inputs(self, output: Any, cache: Any, step: int) -> dict[str, Any]:
        token = self._tokens[:, step : step + 1]
        known: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        mask = self._inputs.get("attention_mask")
        if not self.family.encoder_decoder:
            if mask is not None:
                known["attention_mask"] = torch.cat([mask, mask.new_ones(self.batch, step + 1)], dim=1)
            return {"input_ids": token, **known}
        if mask is not None:
            known["attention_mask"] = mask
        return {"decoder_input_ids": token, "encoder_outputs": (output.encoder_last_hidden_state,), **known}

    def _new_cache(self) -> Any:
        transformers = _transformers()
        config: Any = self.model.config
        if self.phase == "decode":
            caches = [transformers.DynamicCache(config=config) for _ in range(2)]
        else:
            room = self.seq + self.steps + 4
            source = config.max_source_positions if self.family.kind == "speech2text" else self.seq
            caches = [transformers.StaticCache(config=config, max_cache_len=n) for n in (room, source)]
        return transformers.EncoderDecoderCache(*caches) if self.family.encoder_decoder else caches[0]


def _first(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if "logits" in output else output.last_hidden_state


def workload(name: str, phase: Phase = "prefill", **settings: Any) -> Workload:
    """A fresh model of the family with inputs; `settings` go to `Workload` or, failing that, to `build`.

    Raises:
        ZooError: as `build`, or the family has no such phase.
    """
    own = {key: settings.pop(key) for key in ("batch", "seq", "steps", "padding") if key in settings}
    chosen = family(name)
    if phase not in chosen.phases:
        raise ZooError(f"{name} has no phase {phase!r}; it has {', '.join(chosen.phases)}")
    return Workload(build(name, **settings), chosen, phase, **own)
