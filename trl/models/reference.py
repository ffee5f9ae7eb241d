"""Reference models: frozen copies of the initial policy for the KL penalty."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from trl.models.adapters import is_peft_model
from trl.models.trunk import base_language_model, unwrap

M = TypeVar("M", bound=nn.Module)

# Module paths of decoder layers in known architectures.
LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "transformer.blocks.{layer}",
    "model.decoder.layers.{layer}",
    "led.decoder.layers.{layer}",
    "prophetnet.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "backbone.layers.{layer}",
    "decoder.block.{layer}",
    "model.layers.{layer}",
)
# Substrings of the names of modules that decoders run before their first layer.
_EMBEDDING_NAMES = ("emb", "wte", "wpe", "shared", "project_in")


def create_reference_model(model: M, num_shared_layers: int | None = None, pattern: str | None = None) -> M:
    """Creates a frozen copy of `model` in evaluation mode.

    With `num_shared_layers`, the decoder's first layers and everything before them (embeddings, an encoder-decoder's
    whole encoder) are shared instead of copied: both models hold the same tensors, which are frozen in the trained
    model, too. A model with an adapter is copied with its adapter. (For PPO it needs no copy: with `ref_model=None`,
    the trainer takes the model with its adapter off as the reference, where the adapter starts at zero.)

    Args:
        model: a value-head model or a transformers model.
        num_shared_layers: number of layers to share; None copies everything.
        pattern: module path of a layer, such as "transformer.h.{layer}"; by default the first known one that matches.

    Returns:
        A model of the same class.

    Raises:
        ValueError: if `model` has no layers under `pattern` or fewer than `num_shared_layers`, or if layers under an
            adapter are to be shared.
    """
    inner = unwrap(model)
    if num_shared_layers is not None and is_peft_model(getattr(inner, "pretrained_model", inner)):
        raise ValueError(
            f"num_shared_layers={num_shared_layers} would freeze adapter weights in the trained model: leave it out, "
            "or pass ref_model=None to the trainer, which then shares the whole model and turns its adapter off"
        )
    shared: list[nn.Parameter] = []
    if num_shared_layers is not None:
        shared = list(_shared_parameters(base_language_model(inner), num_shared_layers, pattern))
    elif pattern is not None:
        raise ValueError(f"pattern={pattern!r} has no effect without num_shared_layers")
    for parameter in shared:
        parameter.requires_grad_(False)
        parameter.grad = None
    # deepcopy treats entries of its memo as already copied, so the copy holds the same parameters.
    reference: Any = copy.deepcopy(inner, {id(parameter): parameter for parameter in shared})
    reference.zero_grad()
    return reference.requires_grad_(False).eval()


def check_reference(reference: nn.Module, model: nn.Module) -> None:
    """Checks that the reference shares no trained parameter with the model, excluding its unused value head.

    A reference that is trained along with the model would keep the KL at 0.

    Raises:
        ValueError: if it shares trained parameters.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    shared = [name for name, p in reference.named_parameters() if id(p) in trained and "v_head." not in name]
    if shared:
        raise ValueError(
            f"ref_model shares {len(shared)} trained parameters with the model, such as {shared[0]}, and would change "
            "with it: omit ref_model, or create it with create_reference_model(model). See "
            "docs/doctor.md#reference-is-policy"
        )


def _shared_parameters(base: nn.Module, num_shared_layers: int, pattern: str | None) -> Iterator[nn.Parameter]:
    """Yields the parameters of the first layers and of everything that runs before them."""
    if isinstance(num_shared_layers, bool) or not isinstance(num_shared_layers, int) or num_shared_layers < 0:
        raise ValueError(f"num_shared_layers={num_shared_layers!r} must be a whole number >= 0")
    pattern = _find_pattern(base, pattern)
    depth = _depth(base, pattern)
    if num_shared_layers > depth:
        raise ValueError(f"num_shared_layers={num_shared_layers} is more than the {depth} layers under {pattern!r}")
    head, tail = pattern.split("{layer}")
    stack = head.rstrip(".")
    first = tuple(f"{head}{layer}{tail}." for layer in range(num_shared_layers))
    is_encoder_decoder = getattr(base.config, "is_encoder_decoder", False)
    encoder = base.get_encoder() if is_encoder_decoder else None  # type: ignore[operator]
    encoder_ids = {id(p) for p in encoder.parameters()} if encoder is not None else set()
    for name, parameter in base.named_parameters():
        embeds = not name.startswith(f"{stack}.") and any(
            mark in part for part in name.split(".")[:-1] for mark in _EMBEDDING_NAMES
        )
        if name.startswith(first) or id(parameter) in encoder_ids or (embeds and not _is_lm_head(base, parameter)):
            yield parameter


def _is_lm_head(base: Any, parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to the language-model head and is not tied to the embeddings."""
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    tied = any(parameter is p for p in embeddings.parameters())
    return not tied and any(parameter is p for p in head.parameters())


def _find_pattern(base: nn.Module, pattern: str | None) -> str:
    """Returns `pattern`, or the first known pattern that matches layers of `base`; ValueError if none does."""
    candidates = LAYER_PATTERNS if pattern is None else (pattern,)
    for candidate in candidates:
        if candidate.count("{layer}") == 1 and _depth(base, candidate):
            return candidate
    matching = ", ".join(name for name in LAYER_PATTERNS if _depth(base, name)) or "none"
    raise ValueError(
        f"pattern={pattern!r} matches no layer of {type(base).__name__}; "
        f"known patterns: {', '.join(LAYER_PATTERNS)}; of these, matching: {matching}"
    )


def _depth(base: nn.Module, pattern: str) -> int:
    """Counts the layers that match `pattern`."""
    names = {name for name, _ in base.named_modules()}
    depth = 0
    while pattern.replace("{layer}", str(depth)) in names:
        depth += 1
    return depth
