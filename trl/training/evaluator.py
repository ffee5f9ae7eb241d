"""Evaluates policy and reference on a rollout before an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl.models import RolloutAboveFrozen, reference_mode, shares_frozen
from trl.training.batched import evaluate_in_batches, exact_kl_of, with_frozen_states
from trl.training.compute import Compute
from trl.training.modes import eval_mode
from trl.types import Evaluation, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A rollout with its evaluation by policy and reference, before the update."""

    rollout: Rollout  # with the cached states of frozen layers, where these apply
    policy: Evaluation
    ref_logprobs: Tensor | None  # [B, S]; None if the reference was not evaluated
    exact_kl: Tensor | None = None  # [B, S], only on request


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates rollouts with dropout off and without gradients, `batch_size` sequences at a time or more."""

    policy: nn.Module  # wrapped for its processes
    ref_model: nn.Module | None  # None: the policy with its adapter off
    compute: Compute | None  # None: weights as stored, all layers in every pass
    accelerator: Any
    batch_size: int
    temperature: float
    known: Evaluation | None = None  # the policy's evaluation, if sampling has already computed it
    values: bool = True  # evaluate the critic
    compare: bool = True  # evaluate the reference
    exact_kl: bool = False  # also compute the KL over the whole vocabulary

    def __call__(self, rollout: Rollout) -> Evaluated:
        """Evaluates `B` sequences. Every process must call this."""
        with self.evaluating():
            if self.compute is not None:
                rollout = with_frozen_states(
                    self.policy, rollout, batch_size=self.batch_size, autocast=self.accelerator.autocast
                )
            policy = self.known or self._evaluate(self.policy, rollout, entropy=True, values=self.values)
            if not self.compare:
                return Evaluated(rollout=rollout, policy=policy, ref_logprobs=None)
            with self.reference() as reference:
                shared = rollout
                if isinstance(rollout, RolloutAboveFrozen) and not shares_frozen(self.policy, reference, rollout.depth):
                    shared = rollout.without_states()
                ref_logprobs = self._evaluate(reference, shared, entropy=False, values=False).logprobs
            exact = self.kl_over_vocabulary(shared)
        return Evaluated(rollout=rollout, policy=policy, ref_logprobs=ref_logprobs, exact_kl=exact)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of every pass: no gradients, dropout off, in the compute dtype."""
        models = [self.policy] if self.ref_model is None else [self.policy, self.ref_model]
        passes = nullcontext() if self.compute is None else self.compute.fresh_passes()
        with torch.no_grad(), eval_mode(*models), passes:
            yield

    def reference(self) -> AbstractContextManager[nn.Module]:
        """Context that yields the reference model."""
        return reference_mode(self.policy) if self.ref_model is None else nullcontext(self.ref_model)

    def kl_over_vocabulary(self, rollout: Rollout) -> Tensor | None:
        """`[B, S]` exact KL; None unless `exact_kl`."""
        if not self.exact_kl:
            return None
        with self.accelerator.autocast():
            return exact_kl_of(
                self.policy, self.reference, rollout, batch_size=self.batch_size, temperature=self.temperature
            )

    def _evaluate(self, model: nn.Module, rollout: Rollout, *, entropy: bool, values: bool) -> Evaluation:
        return evaluate_in_batches(
            model,
            rollout,
            batch_size=self.batch_size,
            temperature=self.temperature,
            entropy=entropy,
            values=values,
        )
