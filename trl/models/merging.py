"""Merges a trained adapter into its base: a plain transformers folder that needs no peft."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.adapters import peft_part, require_peft
from trl.models.loading import VALUE_HEAD_PREFIX
from trl.models.saving import save_head


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of the plain language model with the active adapter merged in.

    The model does not change, not even by rounding: each layer is merged in a copy. The rest of the tensors are the
    model's own.

    Args:
        model: a value-head model or language model with a PEFT adapter, possibly wrapped.

    Raises:
        ValueError: if the model has no adapter, its base is quantized, an adapter is off or merged already, or the
            merged weights of tied embeddings would differ.
    """
    peft_model = peft_part(model)
    base = peft_model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "an adapter cannot be merged into a quantized base without loss: save the adapter with save_pretrained, "
            "load that folder again without load_in_4bit or load_in_8bit, and merge there"
        )
    state: dict[str, Tensor] = {}
    replaced = dict(_merged_layers(base))
    for name, tensor in base.state_dict().items():
        owner = next((prefix for prefix in _prefixes(name) if prefix in replaced), None)
        if owner is None:
            state[name] = tensor
    for prefix, module in replaced.items():
        state |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    _check_ties(base, state)
    return state


def save_merged(wrapper: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Implements `save_merged` of a value-head model.

    Args:
        wrapper: the value-head model.
        folder: target folder; created if missing.
        **kwargs: arguments of the language model's `save_pretrained`, such as `max_shard_size`.
    """
    base = peft_part(wrapper).get_base_model()
    base.save_pretrained(folder, state_dict=merged_state(wrapper), **kwargs)
    save_head(wrapper.v_head.state_dict(prefix=VALUE_HEAD_PREFIX), folder)


def _merged_layers(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields a plain, merged copy of every layer under an adapter, by name."""
    peft = require_peft("save_merged")
    layer_kind, copy_kind = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper
    for name, module in base.named_modules():
        if not isinstance(module, (layer_kind, copy_kind)):
            continue
        if module.disable_adapters or getattr(module, "merged", False):
            state = "off" if module.disable_adapters else "already merged into the base weights"
            raise ValueError(f"the adapter of {name} is {state}: enable it, or call unmerge_adapter(), first")
        if isinstance(module, copy_kind):
            trained = [module.modules_to_save[key] for key in module.active_adapters if key in module.modules_to_save]
            yield name, (trained or [module.original_module])[0]
        else:
            layer: Any = copy.deepcopy(module)
            layer.merge(safe_merge=True)
            yield name, layer.get_base_layer()


def _prefixes(name: str) -> Iterator[str]:
    """Yields the names of the modules that a tensor is in: "a.b", "a" for "a.b.weight"."""
    while name := name.rpartition(".")[0]:
        yield name


def _check_ties(base: Any, state: dict[str, Tensor]) -> None:
    """Raises ValueError if an adapter changed one of two tied embeddings, which a plain folder cannot express."""
    if not getattr(base.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return
    names = {id(module): name for name, module in base.named_modules()}
    keys = [f"{names.get(id(module))}.weight" for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    first, second = (state.get(key) for key in keys)
    if first is not None and second is not None and not torch.equal(first, second):
        raise ValueError(
            f"{keys[0]} and {keys[1]} are tied, but the adapter changed only one of them, so that no plain folder "
            "gives the same logits: save the adapter with save_pretrained instead"
        )
