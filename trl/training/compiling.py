"""Compiles the models' layers after checking them once against eager execution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn

from trl.models import evaluate
from trl.models.limits import vocabulary_sizes
from trl.models.recompute import CompiledCode, CompileError, compile_errors, compiled_layers
from trl.models.trunk import is_encoder_decoder
from trl.training.modes import eval_mode
from trl.types import Rollout

logger = logging.getLogger(__name__)


def compile_passes(
    policy: nn.Module,
    reference: nn.Module | None,
    passes: Callable[[], AbstractContextManager[object]],
    *,
    narrow: bool,
) -> CompiledCode:
    """Compiles the models' layers for scoring and updating, if compilation works here and matches eager results.

    Two short sequences are run through both versions, gradients included. If compilation fails, or if log-probabilities
    or gradients have a relative error above √eps of the coarsest dtype, layers stay eager and the reason is logged.

    Args:
        policy: the trained model, wrapped for its processes.
        reference: the frozen reference; None if it is the policy with its adapter off.
        passes: context for forward and backward passes.
        narrow: whether passes run in bfloat16, whatever the weights' dtype.

    Returns:
        The compiled code, switched off if unused.
    """
    code = CompiledCode()
    models = [policy] if reference is None else [policy, reference]
    rollout = _probe(policy)
    failures: tuple[type[Exception], ...] = (CompileError, *compile_errors())
    dtypes = {p.dtype for model in models for p in model.parameters() if p.is_floating_point()}
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes | ({torch.bfloat16} if narrow else set())) ** 0.5
    try:
        with torch.random.fork_rng(), eval_mode(*models), passes():
            expected = [_numbers(model, rollout) for model in models]
            for model in models:
                compiled_layers(model, code)
            found = [_numbers(model, rollout) for model in models]
        for (name, want), (_, got) in zip(chain(*expected), chain(*found), strict=True):
            error = float((got - want).norm() / want.norm().clamp(min=1e-12))
            logger.info("compiled layers: %s differ by %.2g of their size", name, error)
            if not error <= tolerance:
                raise CompileError(f"{name} differ by {error:.2g} of their size, {tolerance:.2g} is allowed")
    except failures as error:
        code.switch_off(f"{type(error).__name__}: {error}")
    return code


def _probe(model: nn.Module) -> Rollout:
    """A test rollout of two sequences, of 5 and 7 tokens."""
    device = next(model.parameters()).device
    reads, writes = vocabulary_sizes(model)
    attention = torch.tensor([[1] * 5 + [0] * 2, [1] * 7], device=device).bool()
    words = torch.arange(14, device=device).reshape(2, 7) + 1
    seq2seq = is_encoder_decoder(model)
    return Rollout(
        tokens=words % (writes or 2),
        attention=attention,
        mask=attention[:, 1:],
        encoder_tokens=words % (reads or 2) if seq2seq else None,
        encoder_attention=attention if seq2seq else None,
    )


def _numbers(model: nn.Module, rollout: Rollout) -> list[tuple[str, Tensor]]:
    """Named log-probabilities and, for a trainable model, the gradient of their sum."""
    with torch.no_grad():
        logprobs = evaluate(model, rollout).logprobs[rollout.mask]
    found = [("log-probabilities", logprobs.double())]
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        total = evaluate(model, rollout).logprobs[rollout.mask].sum()
        # autograd.grad rather than backward, which would add to any existing `.grad`.
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        found.append(("gradients", torch.cat([g.double().flatten() for g in gradients if g is not None])))
    return found
