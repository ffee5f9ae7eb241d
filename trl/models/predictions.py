"""Token log-probabilities without materialising logits, and run-time checks of which models support it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trl.kernels.door import kernels_enabled
from trl.kernels.packed_attention import packed
from trl.kernels.products import LinearForward
from trl.kernels.projection import projected_logprobs_and_entropy
from trl.models.trunk import accepts, base_language_model, is_encoder_decoder, trial_words, unwrap, without_head

logger = logging.getLogger(__name__)

# Tolerance of packed against single sequences: RMS error over the logits' standard deviation, by bytes per weight.
_TOLERANCE = {8: 1e-3, 4: 1e-3, 2: 0.5}  # bfloat16 alone moves logits by 0.25 relative to float32
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The tokens whose log-probabilities a forward pass returns instead of logits."""

    rows: Tensor  # [N] int64: position that predicts each token, as an index into the flattened decoder tokens [B, T]
    tokens: Tensor  # [N] int64
    temperature: float
    entropy: bool


@dataclass(frozen=True, slots=True)
class Abilities:
    """Fast evaluation paths that a model supports."""

    projects: bool  # logits are exactly the output embedding applied to its input
    packs: bool  # several sequences can be packed into one row


_FOUND: WeakKeyDictionary[nn.Module, tuple[Any, Abilities]] = WeakKeyDictionary()  # with the `_marks` probed


def predict(pretrained: nn.Module, inputs: dict[str, Any], wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Returns `[N]` float32 log-probabilities and entropies, for a model whose `abilities` say `projects`."""
    head = base_language_model(pretrained).get_output_embeddings()
    with without_head(pretrained) as seen:
        pretrained(**inputs)
    assert seen.value is not None
    return projected_logprobs_and_entropy(
        seen.value.flatten(0, 1)[wanted.rows],
        head.weight,
        wanted.tokens,
        bias=head.bias,
        temperature=wanted.temperature,
        entropy=wanted.entropy,
    )


def abilities(model: nn.Module) -> Abilities:
    """Probes a model on a few tokens for its fast evaluation paths; cached per output embedding. None with kernels off."""
    if not kernels_enabled():
        return Abilities(projects=False, packs=False)
    base = base_language_model(model)
    tried = _marks(base.get_output_embeddings())
    if base not in _FOUND or _FOUND[base][0] != tried:
        pretrained = getattr(unwrap(model), "pretrained_model", unwrap(model))
        modes = {module: module.training for module in pretrained.modules()}
        pretrained.eval()
        try:
            with torch.no_grad():
                reason = _keeps_logits(pretrained)
                packs = _cannot_pack(pretrained) if reason is None else reason
        finally:
            for module, mode in modes.items():
                module.training = mode
        _FOUND[base] = tried, Abilities(projects=reason is None, packs=packs is None)
        name = type(base).__name__
        if reason is not None:
            logger.info("%s: logits of all words are made at once: %s", name, reason)
        elif packs is not None:
            logger.info("%s: sequences are padded to one length, not packed: %s", name, packs)
    return _FOUND[base][1]


def _marks(head: Any) -> tuple[Any, ...]:
    """Cache key of an output embedding; changes when an adapter is injected or hooks are registered."""
    return (type(head), id(head), *getattr(head, "_forward_hooks", ()), *getattr(head, "_forward_pre_hooks", ()))


def may_pack(model: nn.Module) -> bool:
    """Whether sequences can be packed into one row in the next pass."""
    for module in base_language_model(model).modules():
        # transformers' checkpointing recomputes activations after packed attention has been deselected.
        if module.training and getattr(module, "gradient_checkpointing", False):
            return False
        if getattr(module, "_compiled_call_impl", None) is not None:
            return False
    return abilities(model).packs


def _plain(model: Any, words: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": words[None]} | ({"use_cache": False} if accepts(model, "use_cache") else {})
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = words[None]
    return inputs


def _keeps_logits(model: Any) -> str | None:
    """Returns why logits are more than the output projection; None if they are exactly that."""
    head = base_language_model(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output embedding is a {type(head).__name__}"
    if hasattr(head.weight, "device_mesh") or hasattr(head.weight, "ds_id") or head.weight.numel() == 0:
        return "its weights are spread over processes"
    if hasattr(head, "_hf_hook") or not isinstance(vars(head).get("forward"), LinearForward | None):
        return "its output embedding is moved between devices"
    if head._forward_hooks:
        return "its output embedding has hooks, which may change what it returns"
    given: list[Tensor] = []
    words = trial_words(model)[0]
    handle = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        logits = model(**_plain(model, words)).logits
    finally:
        handle.remove()
    if len(given) != 1 or given[0].shape[:-1] != (1, len(words)):
        return "its output embedding is not called once on every token"
    if logits.shape[-1] != head.weight.shape[0] or not torch.equal(head(given[0]).float(), logits.float()):
        return "its logits are changed after the projection"
    try:
        with without_head(model):
            model(**_plain(model, words))
    except (RuntimeError, ValueError, IndexError) as error:
        return f"it does not run without the projection: {type(error).__name__}: {error}"
    return None


def _cannot_pack(model: Any) -> str | None:
    """Returns why sequences cannot be packed into one row; None if they can."""
    base = base_language_model(model)
    if is_encoder_decoder(model):
        return "it is an encoder-decoder"
    if base.device.type != "cpu":
        return "packed attention is written for CPUs"
    if not accepts(model, "position_ids"):
        return "it takes no position_ids"
    if strange := set(getattr(decoder_config(model), "layer_types", None) or ()) - _KNOWN_LAYERS:
        return f"it has layers of {', '.join(sorted(strange))}"
    words = trial_words(model)
    try:
        row = packed_inputs(words)
        with packed(decoder_config(model), [len(some) for some in words]):
            together = model(**row).logits[0].split([len(some) for some in words])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    for some, seen in zip(words, together, strict=True):
        alone = model(**_plain(model, some)).logits[0].float()
        gap = ((seen.float() - alone).square().mean(dim=-1).sqrt() / alone.std(dim=-1)).max().item()
        if not gap <= _TOLERANCE.get(base.get_input_embeddings().weight.element_size(), 0.5):
            return f"a packed sequence is off by {gap:.1e} standard deviations of its logits"
    return None


def decoder_config(model: nn.Module) -> Any:
    """Returns the configuration that the decoder layers read."""
    return base_language_model(model).config.get_text_config(decoder=True)


def packed_inputs(sequences: Sequence[Tensor]) -> dict[str, Any]:
    """Builds forward keyword arguments for sequences packed into one row."""
    positions = [torch.arange(len(sequence), device=sequence.device) for sequence in sequences]
    return {
        "input_ids": torch.cat(list(sequences))[None],
        "position_ids": torch.cat(positions)[None],
        "use_cache": False,
    }
