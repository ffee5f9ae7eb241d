"""Token log-probabilities without materialising logits, and run-time checks of which models support it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trl.functional.probes import logits_error, logits_tolerance
from trl.kernels.door import kernels_enabled
from trl.kernels.packed_attention import packed
from trl.kernels.products import LinearForward
from trl.kernels.projection import projected_predictions
from trl.models.padding import unpadded_inputs
from trl.models.trunk import (
    accepts,
    base_language_model,
    evaluation_mode,
    is_encoder_decoder,
    pretrained_part,
    probe_sequences,
    unwrap,
    without_head,
)

logger = logging.getLogger(__name__)

_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # names in configurations


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRequest:
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


_CACHE: WeakKeyDictionary[nn.Module, dict[Any, Abilities]] = WeakKeyDictionary()  # by model and `_cache_key`


def predict(pretrained: nn.Module, inputs: dict[str, Any], request: PredictionRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `[N]` float32 log-probabilities, entropies, and bool: whether the token is the most likely one.

    Only for models whose `abilities` say `projects`.
    """
    return score_tokens(pretrained, requested_states(pretrained, inputs, request), request)


def requested_states(pretrained: nn.Module, inputs: dict[str, Any], request: PredictionRequest) -> Tensor:
    """Runs the model without its output projection and returns that projection's inputs `[N, H]` at `request.rows`."""
    with without_head(pretrained) as captured:
        pretrained(**inputs)
    assert captured.value is not None
    return captured.value.flatten(0, 1)[request.rows]


def score_tokens(pretrained: nn.Module, states: Tensor, request: PredictionRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Projects `[N, H]` states to what `predict` returns."""
    head = base_language_model(pretrained).get_output_embeddings()
    return projected_predictions(
        states,
        head.weight,
        request.tokens,
        bias=head.bias,
        temperature=request.temperature,
        entropy=request.entropy,
    )


@torch.no_grad()
def mean_logits(pretrained: nn.Module, states: Tensor) -> Tensor:
    """Mean logit `[N]` at `[N, H]` states, in float32: the states times the mean output row."""
    head = base_language_model(pretrained).get_output_embeddings()
    mean = states.float() @ head.weight.mean(dim=0, dtype=torch.float32)
    return mean if head.bias is None else mean + head.bias.mean(dtype=torch.float32)


def has_own_forward(model: nn.Module) -> bool:
    """Whether a subclass of our value-head models, or an instance, has a forward that is not ours."""
    module = unwrap(model)
    if not hasattr(module, "v_head"):
        return False
    attributes = vars(module)  # accelerate's mixed precision wraps the forward, and keeps the one before it
    forward = attributes.get("_original_forward") or attributes.get("forward") or type(module).forward
    return getattr(forward, "__module__", "") != "trl.models.wrapper"


def abilities(model: nn.Module) -> Abilities:
    """Probes a model for its fast evaluation paths; cached per output embedding. None with kernels off."""
    if not kernels_enabled() or has_own_forward(model):
        return Abilities(projects=False, packs=False)
    base = base_language_model(model)
    key = _cache_key(base.get_output_embeddings())
    probed = _CACHE.setdefault(base, {})
    if key not in probed:
        pretrained = pretrained_part(model)
        with evaluation_mode(pretrained), torch.no_grad():
            projecting = _projection_obstacle(pretrained)
            packing = _packing_obstacle(pretrained) if projecting is None else projecting
        probed[key] = Abilities(projects=projecting is None, packs=packing is None)
        name = type(base).__name__
        if projecting is not None:
            logger.info("%s: every pass computes the full logits: %s", name, projecting)
        elif packing is not None:
            logger.info("%s: sequences are padded, not packed: %s", name, packing)
    return probed[key]


def _cache_key(head: Any) -> tuple[Any, ...]:
    """Cache key of an output embedding; depends on injected adapters, hooks and a GPU's compute dtype."""
    weight = getattr(head, "weight", None)
    # On a GPU, what packs depends on the dtype of the pass.
    kind = (weight.dtype, torch.is_autocast_enabled("cuda")) if isinstance(weight, Tensor) and weight.is_cuda else None
    return (type(head), id(head), kind, *getattr(head, "_forward_hooks", ()), *getattr(head, "_forward_pre_hooks", ()))


def may_pack(model: nn.Module) -> bool:
    """Whether sequences can be packed into one row in the next pass."""
    for module in base_language_model(model).modules():
        # transformers' checkpointing recomputes activations after packed attention has been deselected.
        if module.training and getattr(module, "gradient_checkpointing", False):
            return False
        if getattr(module, "_compiled_call_impl", None) is not None:
            return False
    return abilities(model).packs


def _projection_obstacle(model: Any) -> str | None:
    """Returns why logits are more than the output projection; None if they are exactly that."""
    head = base_language_model(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output embedding is a {type(head).__name__}"
    if hasattr(head.weight, "device_mesh") or hasattr(head.weight, "ds_id") or head.weight.numel() == 0:
        return "its weights are sharded"
    if hasattr(head, "_hf_hook") or not isinstance(vars(head).get("forward"), LinearForward | None):
        return "its output embedding is moved between devices"
    if head._forward_hooks:
        return "its output embedding has hooks, which may change its output"
    hidden: list[Tensor] = []
    tokens = probe_sequences(model)[0]
    inputs = unpadded_inputs(model, tokens)
    handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if len(hidden) != 1 or hidden[0].shape[:-1] != (1, len(tokens)):
        return "its output embedding is not called once on every token"
    if logits.shape[-1] != head.weight.shape[0] or not torch.equal(head(hidden[0]).float(), logits.float()):
        return "its logits are changed after the projection"
    try:
        with without_head(model):
            model(**inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"it does not run without the projection: {type(error).__name__}: {error}"
    return None


def _packing_obstacle(model: Any) -> str | None:
    """Returns why sequences cannot be packed into one row; None if they can."""
    base = base_language_model(model)
    if is_encoder_decoder(model):
        return "it is an encoder-decoder"
    if base.device.type not in ("cpu", "cuda"):
        return "packed attention supports CPUs and CUDA only"
    if base.device.type == "cuda" and any(getattr(decoder_config(model), name, None) for name in _DROPOUT):
        return "packed attention has no dropout on a GPU"
    if not accepts(model, "position_ids"):
        return "its forward takes no position_ids"
    if unknown := set(getattr(decoder_config(model), "layer_types", None) or ()) - _PACKABLE_LAYERS:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    sequences = probe_sequences(model)
    lengths = [len(sequence) for sequence in sequences]
    try:
        with packed(decoder_config(model), lengths):
            parts = model(**packed_inputs(sequences)).logits[0].split(lengths)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    for sequence, logits in zip(sequences, parts, strict=True):
        difference = logits_error(logits, model(**unpadded_inputs(model, sequence)).logits[0])
        if not difference <= logits_tolerance(base.get_input_embeddings().weight):
            return f"packing changes its logits by {difference:.1e} standard deviations"
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
