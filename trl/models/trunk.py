"""Introspection of language models: the module under the wrappers, its decoder, its forward's signature, and hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl.functional.probes import probe_tokens
from trl.kernels.door import replaced_forwards


def unwrap(model: nn.Module) -> nn.Module:
    """Strips DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def pretrained_part(model: nn.Module) -> Any:
    """Returns the transformers or PEFT model inside parallel wrappers and the value-head model."""
    inner: Any = unwrap(model)
    return getattr(inner, "pretrained_model", inner)


def base_language_model(model: nn.Module) -> Any:
    """Returns the plain transformers model under all wrappers: parallel, value head and PEFT."""
    inner: Any = unwrap(pretrained_part(model))
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model encodes queries and decodes responses."""
    return bool(getattr(base_language_model(model).config, "is_encoder_decoder", False))


def decoder_of(model: nn.Module) -> Any:
    """Returns the module that computes the last hidden states [B, T, H], the language-model head's input.

    Raises:
        ValueError: if the model has no such module apart from its head.
    """
    base = base_language_model(model)
    # `get_decoder` returns the head if that is named `decoder` (ModernBERT), and the whole model if the trunk's
    # attribute is not named as the class declares (Llama 4).
    for module in (base.get_decoder(), getattr(base, "base_model", None), getattr(base, "model", None)):
        if isinstance(module, nn.Module) and module is not base and module is not base.get_output_embeddings():
            return module
    raise ValueError(f"{type(base).__name__} has no decoder apart from its language-model head")


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Returns the forward parameters of the plain transformers model under `model`."""
    forward = type(base_language_model(model)).forward
    return dict(inspect.signature(forward).parameters)


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the plain transformers model's forward has a parameter `name`."""
    return name in forward_parameters(model)


def has_lm_head(model: nn.Module, namings: list[str] | tuple[str, ...]) -> bool:
    """Whether the model has a language-model head: an output embedding, or a module named in `namings`."""
    base = base_language_model(model)
    get_head = getattr(base, "get_output_embeddings", None)
    if callable(get_head) and get_head() is not None:
        return True
    return any(name.rpartition(".")[2] in namings for name, _ in base.named_modules())


def probe_sequences(model: Any) -> list[Tensor]:
    """Returns two short token sequences for probing a model."""
    embeddings = model.get_input_embeddings().weight
    tokens = probe_tokens(len(embeddings), 8)
    return [torch.tensor(sequence, device=embeddings.device) for sequence in (tokens[:5], tokens[5:])]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module of `model` into evaluation mode inside the `with` block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class LastHiddenState:
    """Holds the hidden state captured in the latest forward pass."""

    value: Tensor | None = None


@contextmanager
def watch_last_hidden_state(model: nn.Module) -> Iterator[LastHiddenState]:
    """Captures the decoder's last hidden state [B, T, H] with a hook.

    `output_hidden_states=True` would keep every layer's states alive; this keeps only the last.
    """
    captured = LastHiddenState()

    def from_output(module: nn.Module, args: Any, output: Any) -> None:
        captured.value = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def from_input(module: nn.Module, args: Any) -> None:
        captured.value = args[0]

    decoder = decoder_of(model)
    head = getattr(decoder, "output_projection", None)
    if head is not None:  # FSMT's decoder ends in the language-model head and returns logits
        handle = head.register_forward_pre_hook(from_input)
    else:
        handle = decoder.register_forward_hook(from_output)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def without_head(model: nn.Module) -> Iterator[LastHiddenState]:
    """Captures the output projection's input [B, T, H] and skips the projection: logits are [B, T, 0]."""
    captured = LastHiddenState()

    def forward(hidden: Tensor) -> Tensor:
        captured.value = hidden
        return hidden.new_empty(*hidden.shape[:-1], 0)

    with replaced_forwards({base_language_model(model).get_output_embeddings(): forward}):
        yield captured
