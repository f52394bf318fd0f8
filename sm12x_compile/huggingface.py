"""Hugging Face checkpoints whose experts are MXFP4, kept packed in the model.

transformers runs such checkpoints (gpt-oss) with kernels that it downloads, whose weights no graph shows, or decodes
them to bf16 while loading, four times the memory. Here the bytes stay as the checkpoint has them, and the forward pass
decodes them in plain PyTorch: `torch.compile(model, backend="sm12x")` sees what that is and reads the packed weights.

    model = sm12x_compile.huggingface.from_pretrained("openai/gpt-oss-20b", device_map="cuda")
    model = torch.compile(model, backend="sm12x")

A checkpoint holds ``<weight>_blocks`` (uint8 ``[E, N, K / 32, 16]``) and ``<weight>_scales`` (uint8 ``[E, N, K / 32]``)
for a parameter ``<weight>`` of shape ``[E, K, N]``. Needs the extra ``hf``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .lowering.mxfp4_cpu import decode

METHOD = "sm12x_mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` with MXFP4 weights kept packed.

    Args:
        path: a directory or a repository's name.
        **kwargs: as for transformers: ``dtype`` (of what the weights are decoded to as well), ``device_map``, ...

    Raises:
        ImportError: transformers is missing.
        ValueError: the checkpoint holds no packed weights.
    """
    transformers = _transformers()
    location = {k: v for k, v in kwargs.items() if k in _LOCATION}
    names = packed_names(path, **location)
    if not names:
        raise ValueError(f"{path} holds no MXFP4 weights ('*{_BLOCKS}' beside '*{_SCALES}'); load it with transformers")
    _register()
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **location)
    config.quantization_config = {"quant_method": METHOD, "packed": names}
    return transformers.AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)


_LOCATION = ("cache_dir", "revision", "token", "local_files_only", "subfolder")


def packed_names(path: str | Path, **location: Any) -> list[str]:
    """Names of the weights that a checkpoint in safetensors holds packed: ``model.layers.0.mlp.experts.down_proj``."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    find: Any = partial(cached_file, str(path), **location)
    index = find("model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        keys = set(json.loads(Path(index).read_text())["weight_map"])
    else:
        with safe_open(find("model.safetensors"), framework="pt") as file:
            keys = set(file.keys())
    names = (k.removesuffix(_BLOCKS) for k in keys if k.endswith(_BLOCKS))
    return sorted(n for n in names if n + _SCALES in keys)


def keep_packed(model: nn.Module, names: list[str], device: torch.device | str | None = None) -> None:
    """Replace parameters ``[E, K, N]`` by buffers for their packed form, to be loaded from a checkpoint.

    Code that reads the parameter gets it decoded, in the dtype that the parameter had.

    Args:
        model: the model, perhaps on the meta device.
        names: full names of parameters.
        device: of the new buffers; default that of the parameter.

    Raises:
        ValueError: a name is no parameter of three dimensions with K a multiple of 32.
    """
    for full in names:
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3 or weight.shape[1] % 32:
            shape = None if weight is None else tuple(weight.shape)
            raise ValueError(f"{full} is no parameter [E, K, N] with K a multiple of 32, but {shape}")
        E, K, N = weight.shape
        where = device or weight.device
        del module._parameters[name]
        empty = partial(torch.empty, dtype=torch.uint8, device=where)
        module.register_buffer(name + _BLOCKS, empty((E, N, K // 32, 16)))
        module.register_buffer(name + _SCALES, empty((E, N, K // 32)))
        decoded = property(partial(_decoded, name=name, dtype=weight.dtype))
        cls = type(module)
        module.__class__ = type(cls.__name__, (cls,), {name: decoded, "__module__": cls.__module__})


def _decoded(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    blocks, scales = getattr(module, name + _BLOCKS), getattr(module, name + _SCALES)
    return decode(blocks.flatten(-2), scales, dtype).transpose(-1, -2)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "sm12x_compile.huggingface needs transformers: pip install 'sm12x-compile[hf]'"
        ) from error
    return transformers


_registered = False


def _register() -> None:
    """Teach transformers' `from_pretrained` our way to hold weights, once."""
    global _registered
    if _registered:
        return
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class PackedConfig(QuantizationConfigMixin):
        def __init__(self, packed: list[str] | None = None, **kwargs: Any) -> None:
            super().__init__(quant_method=METHOD)  # type: ignore[arg-type]
            self.packed = packed or []

    @register_quantizer(METHOD)
    class PackedQuantizer(HfQuantizer):
        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            keep_packed(model, self.quantization_config.packed)  # type: ignore[attr-defined]
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

    _registered = True
