"""Reads value heads, adapters and language models from a folder or hub id."""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trl.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE_FILE,
    ADAPTER_SAFE_FILE,
    HUB_ARGUMENTS,
    PICKLE_FILE,
    SAFE_FILE,
    check_adapter_format,
    find_file,
    load_model,
)

logger = logging.getLogger(__name__)

VALUE_HEAD_FILE = "v_head.safetensors"
VALUE_HEAD_PREFIX = "v_head."


def read_safetensors(path: str, prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file whose names start with `prefix`; reads no others from disk."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not iterable)
        return {name: file.get_tensor(name) for name in names}


def read_pickle(path: str, prefix: str = "") -> dict[str, Tensor]:
    """Same as `read_safetensors` for a legacy pickled `.bin` file; `weights_only=True`, so no code in it runs."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} contains a {type(state).__name__} instead of a mapping from names to tensors")
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def read_value_head(source: str, hub: Mapping[str, Any], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Returns the `v_head.*` tensors of a folder or hub id; empty if there are none.

    Looks in `v_head.safetensors`, then in the model's (sharded) safetensors, where TRL 0.4-0.11 stored them, then, if
    `allow_pickle`, in a legacy (sharded) `pytorch_model.bin`.
    """
    path = find_file(source, VALUE_HEAD_FILE, hub)
    if path is not None:
        return read_safetensors(path, VALUE_HEAD_PREFIX)
    head = _read_embedded(source, hub, SAFE_FILE, read_safetensors)
    if head or not allow_pickle:
        return head
    return _read_embedded(source, hub, PICKLE_FILE, read_pickle)


def _read_embedded(source: str, hub: Mapping[str, Any], name: str, read: Any) -> dict[str, Tensor]:
    """Reads `v_head.*` from the file `name`, or from the shards listed in its index."""
    path = find_file(source, name, hub)
    if path is not None:
        return read(path, VALUE_HEAD_PREFIX)
    index = find_file(source, f"{name}.index.json", hub)
    if index is None:
        return {}
    with open(index, encoding="utf-8") as file:
        weight_map = json.load(file)["weight_map"]
    head: dict[str, Tensor] = {}
    for shard in sorted({file for key, file in weight_map.items() if key.startswith(VALUE_HEAD_PREFIX)}):
        path = find_file(source, shard, hub)
        if path is None:
            raise ValueError(f"{source!r} lacks {shard}, where its index places the value head")
        head |= read(path, VALUE_HEAD_PREFIX)
    return head


def warn_of_unread_pickle(source: str, hub: Mapping[str, Any]) -> None:
    """Warns that an unread pickle may contain the value head, as in TRL 0.4-0.11 adapter folders."""
    if find_file(source, PICKLE_FILE, hub) is not None:
        logger.warning(
            "did not read %s of %r, because it is a pickle, and initialised a fresh value head; if it contains a value "
            "head, pass allow_pickle=True (it is loaded with weights_only=True)",
            PICKLE_FILE,
            source,
        )


def read_adapter_config(source: str, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the parsed `adapter_config.json` of a folder or hub id; None if it is not a PEFT adapter."""
    path = find_file(source, ADAPTER_CONFIG, hub)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_adapter_weights(source: str, hub: Mapping[str, Any], *, allow_pickle: bool) -> dict[str, Tensor]:
    """Returns all tensors of an adapter.

    Raises:
        ValueError: if the weights are pickled and `allow_pickle` is False, or missing.
    """
    check_adapter_format(source, hub, allow_pickle=allow_pickle)
    path = find_file(source, ADAPTER_SAFE_FILE, hub)
    if path is not None:
        return read_safetensors(path)
    path = find_file(source, ADAPTER_PICKLE_FILE, hub)
    assert path is not None  # checked above
    return read_pickle(path)


def load_language_model(parent: Any, source: str, *model_args: Any, allow_pickle: bool, **kwargs: Any) -> Any:
    """`parent.from_pretrained` with float32 and safetensors as the defaults.

    Args:
        parent: a transformers auto class.
        source: folder or hub id of a language model.
        *model_args: passed to transformers.
        allow_pickle: read a legacy `.bin` if there are no safetensors.
        **kwargs: passed to transformers; `torch_dtype` becomes `dtype`, and `load_in_8bit` / `load_in_4bit` become the
            `quantization_config` that transformers 5 expects. `trust_remote_code` defaults to False.

    Raises:
        ValueError: if the weights are pickled and `allow_pickle` is False, or the model needs the checkpoint's own code
            and `trust_remote_code` is not True.
    """
    model = load_model(parent, source, *model_args, allow_pickle=allow_pickle, **transformers_arguments(kwargs))
    if getattr(model, "is_loaded_in_4bit", False):
        # On CPUs with AVX512-BF16, a pass in evaluation mode would repack the weights for a product that has no
        # gradient, and updates after sampling would be wrong.
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
    return model


def transformers_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Translates keyword arguments to transformers 5's names and adds this library's defaults."""
    kwargs = dict(kwargs)
    torch_dtype = kwargs.pop("torch_dtype", None)
    if torch_dtype is not None:
        if kwargs.get("dtype", torch_dtype) != torch_dtype:
            raise ValueError(f"dtype={kwargs['dtype']} and torch_dtype={torch_dtype} differ; pass only one of them")
        kwargs["dtype"] = torch_dtype
    quantized = {name: kwargs.pop(name, False) for name in ("load_in_8bit", "load_in_4bit")}
    if any(quantized.values()):
        if kwargs.get("quantization_config") is not None:
            raise ValueError("pass load_in_8bit / load_in_4bit or quantization_config, not both")
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(**quantized)
    if kwargs.get("quantization_config") is None:
        kwargs.setdefault("dtype", torch.float32)
    elif kwargs.get("device_map") is None:
        from accelerate import PartialState

        # PartialState is a process-wide singleton: its first construction also decides, for the trainer, whether CPU
        # processes form a group.
        kwargs["device_map"] = {"": PartialState(cpu=not torch.accelerator.is_available()).device}
    return kwargs


# Arguments of transformers' `from_pretrained` that say how a model is read from disk or a hub.
_HOW_TO_LOAD = (
    *HUB_ARGUMENTS, "attn_implementation", "device_map", "dtype", "load_in_4bit", "load_in_8bit", "local_files_only",
    "low_cpu_mem_usage", "max_memory", "offload_folder", "quantization_config", "torch_dtype", "trust_remote_code",
    "use_auth_token", "use_safetensors", "variant",
)  # fmt: skip


def ignore_beside_object(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Warns that arguments which say how to load a model have no effect on a model object.

    Raises:
        ValueError: if one is no such argument.
    """
    unknown = sorted(set(kwargs) - set(_HOW_TO_LOAD))
    if args or unknown:
        names = ", ".join(unknown) or f"positional arguments {args}"
        close = difflib.get_close_matches(unknown[0], _HOW_TO_LOAD, n=1) if unknown else []
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{names}: no argument that applies to a model object{hint}; drop it")
    if kwargs:
        warnings.warn(
            f"{', '.join(sorted(kwargs))} say how to load a model and are ignored, since a model object was given, not "
            "the name of one: drop them here, and pass them where the object is loaded",
            stacklevel=3,
        )


def as_source(name_or_path: Any) -> str | None:
    """Returns a folder or hub id as a string; None for anything else."""
    return os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
