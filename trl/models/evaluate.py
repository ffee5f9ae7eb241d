"""Evaluates a model on a rollout: log-probabilities, values and entropies of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.functional.kl import exact_kl
from trl.functional.logprobs import token_logprobs_and_entropy
from trl.kernels.packed_attention import packed
from trl.kernels.products import bucket_size
from trl.models.frozen import RolloutAboveFrozen, first_layers_in_training, only_first_layers, skipping_first_layers
from trl.models.padding import (
    clean,
    forward_inputs,
    ignores_padding,
    join_parts,
    left_aligning_order,
    padding_mask,
    reorder,
    split_by_padding,
)
from trl.models.predictions import (
    PredictionRequest,
    abilities,
    decoder_config,
    has_own_forward,
    may_pack,
    requested_states,
    score_tokens,
)
from trl.models.predictions import mean_logits as projected_mean_logits
from trl.models.trunk import (
    base_language_model,
    forward_parameters,
    is_encoder_decoder,
    pretrained_part,
    unwrap,
    without_head,
)
from trl.models.wrapper import PreTrainedModelWrapper
from trl.types import Evaluation, Rollout

_FIELDS = tuple(field.name for field in fields(Evaluation))
# Logits per model that the exact KL holds in memory at a time.
_CHUNK_LOGITS = {"cpu": 2**22, "other": 2**26}


def evaluate(
    model: nn.Module,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    values: bool = True,
    response_only: bool = False,
    return_logits: bool = False,
    mean_logits: bool = False,
    top1: bool = False,
) -> Evaluation:
    """Runs a model over a rollout and returns per-token log-probabilities, values and entropies.

    Padding may be on either side and does not affect the results. The caller sets train/eval mode and grad mode.

    Args:
        model: a value-head model, or a plain language model (no values), possibly wrapped in DDP.
        rollout: `B` sequences of `T` tokens. For an encoder-decoder these are decoder tokens, the first of which is the
            start token, and `encoder_tokens` holds the queries.
        temperature: sampling temperature, which divides the logits; > 0.
        entropy: also compute entropies.
        values: return values (almost free).
        response_only: compute only the tokens in `rollout.mask`, or the columns they span if logits are materialised.
        return_logits: also return the logits, in the model's dtype and not divided by the temperature.
        mean_logits: also return the logits' mean over the vocabulary, not divided by the temperature and without a
            gradient.
        top1: also return whether each token is the most likely one; for a model without a value head.

    Returns:
        float32 tensors [B, S]; columns that were not computed are 0. Logits, if requested, are [B, S, V].

    Raises:
        ValueError: if an encoder-decoder gets no `encoder_tokens`, or a decoder-only model gets them.
    """
    _check_rollout(model, rollout)
    if not ignores_padding(model) and bool(padding_mask(rollout).any()):
        parts = [
            evaluate(
                model,
                part,
                temperature=temperature,
                entropy=entropy,
                values=values,
                response_only=response_only,
                return_logits=return_logits,
                mean_logits=mean_logits,
                top1=top1,
            )
            for part in split_by_padding(rollout)
        ]
        joined = {name: join_parts(rollout, [getattr(part, name) for part in parts]) for name in _FIELDS}
        return Evaluation(**joined)  # type: ignore[arg-type]
    if not return_logits and abilities(model).projects:
        return _without_logits(model, rollout, temperature, entropy, values, response_only, mean_logits, top1)
    return _with_logits(model, rollout, temperature, entropy, values, response_only, return_logits, mean_logits, top1)


def _with_logits(
    model: nn.Module,
    rollout: Rollout,
    temperature: float,
    entropy: bool,
    values: bool,
    response_only: bool,
    return_logits: bool,
    mean_logits: bool,
    top1: bool,
) -> Evaluation:
    """`evaluate` through the model's own logits."""
    # Left-align rows, so that positions count from column 0 for every position scheme and recurrent states start at the
    # first token; `place` undoes it.
    order = left_aligning_order(rollout.attention)
    tokens = reorder(clean(rollout.tokens, rollout.attention), order)  # [B, T]
    attention = reorder(rollout.attention.bool(), order)  # [B, T]
    mask = reorder(F.pad(rollout.mask, (0, 1)), order)  # [B, T], column s means the same as in [B, S]
    requested = _span(mask) if response_only else slice(0, tokens.shape[1] - 1)

    inputs = forward_inputs(model, tokens, attention, rollout.encoder_tokens, rollout.encoder_attention)
    if has_own_forward(model):  # a client's, which may take fewer arguments and compute other logits
        computed, inputs = slice(0, tokens.shape[1]), _accepted(model, inputs)
    else:
        computed, keep = _logits_to_keep(model, requested, tokens)
        inputs |= keep | ({"float32_logits": False} if _has_values(model) else {})
    output = model(**inputs)
    logits, state_values = (output[0], output[2]) if _has_values(model) else (output.logits, None)  # [B, c, V], [B, T]

    if response_only and computed != requested:
        logits = logits[:, requested.start - computed.start : requested.stop - computed.start]
        computed = requested
    targets = F.pad(tokens[:, 1:], (0, 1))[:, computed]  # the last column has no next token: 0 is a filler
    logprobs, entropies = token_logprobs_and_entropy(logits, targets, temperature=temperature, entropy=entropy)

    def place(x: Tensor) -> Tensor:
        """Maps the computed columns [B, c, ...] to the rollout's columns [B, S, ...]."""
        edges = (computed.start, tokens.shape[1] - computed.stop)
        x = F.pad(x, (*(0, 0) * (x.dim() - 2), *edges))
        return reorder(x, order.argsort(dim=1))[:, :-1]

    return Evaluation(
        logprobs=place(logprobs),
        values=place(state_values[:, computed]) if values and state_values is not None else None,
        entropy=place(entropies) if entropy else None,
        logits=place(logits) if return_logits else None,
        mean_logits=place(logits.detach().mean(dim=-1, dtype=torch.float32)) if mean_logits else None,
        top1=place(logits.argmax(dim=-1) == targets) if top1 else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Inputs for a model whose `abilities` say `projects`; packed where possible, to compute little on padding."""

    inputs: dict[str, Any]  # keyword arguments of the model's forward
    context: AbstractContextManager[None]  # context to run the forward in
    place: Tensor  # [B, T] index of each token in the flattened decoder inputs
    requested: Tensor  # [B, S] True where a prediction is requested
    rows: Tensor  # [N] index of each requested prediction in them; padded to repeat few distinct N
    tokens: Tensor  # [N] token predicted there

    def scatter_states(self, states: Tensor, attention: Tensor) -> Tensor:
        """Scatters `[B, T, H]` into the inputs' shape `[b, t, H]`, 0 where they have no token."""
        shape = self.inputs["input_ids"].shape
        flat = states.new_zeros(shape.numel(), states.shape[-1])
        flat[self.place[attention]] = states[attention]
        return flat.view(*shape, -1)

    def scatter(self, x: Tensor) -> Tensor:
        """Scatters `[N]` predictions to `[B, S]`, 0 elsewhere."""
        targets = self.requested.nonzero(as_tuple=True)
        return x.new_zeros(self.requested.shape).index_put(targets, x[: len(targets[0])])


def _layout(model: nn.Module, rollout: Rollout, response_only: bool) -> _Layout:
    attention = rollout.attention.bool()
    requested = rollout.mask & attention[:, 1:] if response_only else attention[:, :-1] & attention[:, 1:]
    row, column = requested.nonzero(as_tuple=True)
    tokens = clean(rollout.tokens, attention)
    count = attention.long().cumsum(dim=1) - 1  # [B, T] position of each token in its sequence
    context: AbstractContextManager[None] = nullcontext()
    if may_pack(model):
        lengths = attention.sum(dim=1)
        order = lengths.argsort(stable=True)
        before = torch.zeros_like(lengths)
        before[order[1:]] = lengths[order[:-1]].cumsum(dim=0)
        place = before[:, None] + count
        flat_index = place[attention]
        size = len(flat_index)
        flat = flat_index.new_zeros(bucket_size(size) if flat_index.device.type == "cpu" else size)
        flat[flat_index] = tokens[attention]
        positions = torch.zeros_like(flat)
        positions[flat_index] = count[attention]
        inputs = {"input_ids": flat[None], "position_ids": positions[None], "use_cache": False}
        context = packed(decoder_config(model), [n for n in lengths[order].tolist() if n > 0])
    else:
        order = left_aligning_order(attention)
        start = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
        place = start + count.clamp(min=0)
        inputs = forward_inputs(
            model, reorder(tokens, order), reorder(attention, order), rollout.encoder_tokens, rollout.encoder_attention
        )
    padding = (0, bucket_size(len(row)) - len(row) if row.device.type == "cpu" else 0)
    rows, following = F.pad(place[row, column], padding), F.pad(tokens[row, column + 1], padding)
    layout = _Layout(inputs=inputs, context=context, place=place, requested=requested, rows=rows, tokens=following)
    if not isinstance(rollout, RolloutAboveFrozen) or first_layers_in_training(model, rollout.depth):
        return layout
    states = layout.scatter_states(rollout.states, attention)
    return replace(layout, context=_both(context, skipping_first_layers(model, states, rollout.depth)))


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


def _without_logits(
    model: nn.Module,
    rollout: Rollout,
    temperature: float,
    entropy: bool,
    values: bool,
    response_only: bool,
    return_mean_logits: bool,
    return_top1: bool,
) -> Evaluation:
    """`evaluate` without materialising logits, for models whose `abilities` say `projects`."""
    layout = _layout(model, rollout, response_only)
    request = PredictionRequest(rows=layout.rows, tokens=layout.tokens, temperature=temperature, entropy=entropy)
    state_values = means = top1 = None
    with layout.context:
        if _has_values(model):
            logprobs, entropies, state_values = model(**layout.inputs, request=request)
        else:
            states = requested_states(model, layout.inputs, request)
            logprobs, entropies, top1 = score_tokens(model, states, request)
            means = projected_mean_logits(model, states) if return_mean_logits else None
    return Evaluation(
        logprobs=layout.scatter(logprobs),
        values=layout.scatter(state_values) if values and state_values is not None else None,
        entropy=layout.scatter(entropies) if entropy else None,
        mean_logits=layout.scatter(means) if means is not None else None,
        top1=layout.scatter(top1) if return_top1 and top1 is not None else None,
    )


@torch.no_grad()
def evaluate_exact_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    rollout: Rollout,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Computes KL(policy || reference) over the full vocabulary at every position.

    If the `abilities` of both models say `projects`, only a few positions' logits are in memory at a time.

    Args:
        policy: as for `evaluate`.
        reference: returns a context manager that yields a model of the same vocabulary; it may be the policy with its
            adapter disabled.
        rollout: `B` sequences of `T` tokens.
        temperature: sampling temperature, which divides the logits; > 0.

    Returns:
        `[B, S]` float32 in nats; 0 where nothing is predicted.
    """
    if not ignores_padding(policy) and bool(padding_mask(rollout).any()):
        parts = split_by_padding(rollout)
        kl = join_parts(rollout, [evaluate_exact_kl(policy, reference, p, temperature=temperature) for p in parts])
        assert kl is not None
        return kl
    with reference() as model:
        projects = abilities(policy).projects and abilities(model).projects
    if not projects:
        p_logits = evaluate(policy, rollout, values=False, return_logits=True).logits
        with reference() as model:
            q_logits = evaluate(model, rollout, values=False, return_logits=True).logits
        assert p_logits is not None and q_logits is not None
        rows = zip(p_logits, q_logits, strict=True)
        return torch.stack([exact_kl(p.float(), q.float(), temperature=temperature) for p, q in rows])
    _check_rollout(policy, rollout)
    layout = _layout(policy, rollout, False)
    p_states = _last_states(policy, layout)
    with reference() as model:
        q_states = _last_states(model, _layout(model, rollout, False))
        p_head, q_head = (base_language_model(x).get_output_embeddings() for x in (policy, model))
        kind = "cpu" if p_states.device.type == "cpu" else "other"
        chunk_rows = max(1, _CHUNK_LOGITS[kind] // len(p_head.weight))
        chunks = [
            exact_kl(p_head(p).float(), q_head(q).float(), temperature=temperature)
            for p, q in zip(p_states.split(chunk_rows), q_states.split(chunk_rows), strict=True)
        ]
    return layout.scatter(torch.cat(chunks) if chunks else p_states.new_zeros(0, dtype=torch.float32))


def _last_states(model: nn.Module, layout: _Layout) -> Tensor:
    """Returns the hidden states `[N, H]` that feed the output projection."""
    pretrained = pretrained_part(model)
    with layout.context, without_head(pretrained) as captured:
        pretrained(**layout.inputs)
    assert captured.value is not None
    return captured.value.flatten(0, 1)[layout.rows]


@torch.no_grad()
def frozen_states(model: nn.Module, rollout: Rollout, depth: int) -> Tensor:
    """Computes the output of the first `depth` layers for a rollout's tokens.

    Args:
        model: a model whose `abilities` say `projects`.
        rollout: `B` sequences of `T` decoder tokens.
        depth: the result of `frozen_depth`, > 0.

    Returns:
        `[B, T, H]`, 0 on padding.
    """
    _check_rollout(model, rollout)
    layout = _layout(model, rollout, False)
    pretrained = pretrained_part(model)
    with layout.context, without_head(pretrained), only_first_layers(model, depth) as outputs:
        pretrained(**layout.inputs)
    (states,) = outputs
    return states.flatten(0, 1)[layout.place].masked_fill(~rollout.attention.bool()[..., None], 0)


def _check_rollout(model: nn.Module, rollout: Rollout) -> None:
    """Raises ValueError if the model cannot read the rollout."""
    shape = tuple(rollout.tokens.shape)
    if tuple(rollout.attention.shape) != shape or tuple(rollout.mask.shape) != (shape[0], shape[1] - 1):
        raise ValueError(
            f"tokens {shape}, attention {tuple(rollout.attention.shape)} and mask {tuple(rollout.mask.shape)} do not "
            "match: attention must have as many columns as tokens, and mask one fewer"
        )
    name = type(base_language_model(model)).__name__
    if is_encoder_decoder(model) and rollout.encoder_tokens is None:
        raise ValueError(f"{name} is an encoder-decoder and needs the rollout's encoder_tokens")
    if not is_encoder_decoder(model) and rollout.encoder_tokens is not None:
        raise ValueError(f"{name} is not an encoder-decoder, but the rollout has encoder_tokens")


def _accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a value-head model's own forward takes."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _has_values(model: nn.Module) -> bool:
    return isinstance(unwrap(model), PreTrainedModelWrapper)


def _span(mask: Tensor) -> slice:
    """Returns the smallest slice of columns, at least one wide, that covers every True in `mask` [B, T]."""
    columns = mask.any(dim=0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1) if columns.numel() else slice(0, 1)


def _logits_to_keep(model: nn.Module, requested: slice, tokens: Tensor) -> tuple[slice, dict[str, Any]]:
    """Returns the columns the model will compute logits for, and the forward argument that selects them."""
    width = tokens.shape[1]
    parameter = forward_parameters(model).get("logits_to_keep")
    if parameter is None:
        return slice(0, width), {}
    if "Tensor" in str(parameter.annotation):
        return requested, {"logits_to_keep": torch.arange(requested.start, requested.stop, device=tokens.device)}
    return slice(requested.start, width), {"logits_to_keep": width - requested.start}
