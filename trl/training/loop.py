"""The one optimisation loop. `.backward(` appears here and nowhere else."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.protocols import LossFn, Reduce
from trl.types import Experience, Tally, identity, occupied, take


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer step sees."""

    experience: Experience  # advantages as the loss is to use them
    denominator: Tensor  # scalar: what the summed loss is divided by, the same on every process
    means: Mapping[str, Tensor] = field(default_factory=dict)  # scalars known before the update, for its metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """What one optimizer step measured."""

    means: dict[str, float]  # over counted tokens of every process, by statistics key
    arrays: dict[str, Tensor]  # [b, S] of this process, by statistics key
    grad_norm: float  # before clipping
    stepped: bool  # False if the gradient was not finite
    seconds: float  # of the optimizer step


@dataclass(kw_only=True)
class Updater:
    """Backward passes and optimizer steps of one model.

    Gradients are summed over microbatches and processes, clipped once, and left in place after the step.
    """

    model: nn.Module
    optimizer: Any
    accelerator: Any
    max_grad_norm: float | None = None
    frozen: Sequence[nn.Parameter] = field(default_factory=tuple)  # keep their values: their gradients are dropped
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which forward and backward passes are made
    after_step: Callable[[], None] = lambda: None  # the weights have changed

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. Only the last microbatch of a minibatch exchanges gradients.

        Every process must call this the same number of times, even without a counted token, or the all-reduce hangs.
        """
        context = nullcontext() if last else self.accelerator.no_sync(self.model)
        with context:
            # Data-parallel wrappers average over processes; the objective is a sum over them.
            self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> tuple[float, bool, float]:
        """One optimizer step. Returns the norm before clipping, whether the step was taken, and its seconds."""
        started = time.perf_counter()
        for parameter in self.frozen:
            parameter.grad = None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.max_grad_norm is not None:
            norm = float(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))
        else:
            self.accelerator.unscale_gradients()
            norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not math.isfinite(norm):
            warnings.warn(
                f"gradient norm is {norm}: this optimizer step is skipped and the weights stay as they are. Look at the "
                "scores, the learning rate and ppo/policy/ratio.",
                stacklevel=2,
            )
            return norm, False, time.perf_counter() - started
        self.optimizer.step()
        self.after_step()
        return norm, True, time.perf_counter() - started


def _mean(tallies: Sequence[dict[str, Tally]], reduce: Reduce) -> dict[str, float]:
    """Adds up the tallies of all microbatches and processes, and divides once."""
    names = list(tallies[0])
    table = torch.stack(
        [
            torch.stack([sum((t[name].sum.double() for t in tallies), start=torch.zeros(())) for name in names]),
            torch.stack([sum((t[name].count.double() for t in tallies), start=torch.zeros(())) for name in names]),
        ]
    )
    sums, counts = reduce(table)
    return dict(zip(names, (sums / counts.clamp(min=1)).tolist(), strict=True))


def microbatches(experience: Experience, size: int) -> list[Experience]:
    """Cuts an experience into pieces of at most `size` sequences, in order."""
    return [take(experience, slice(start, start + size)) for start in range(0, len(experience), size)]


def optimize(
    minibatches: Iterable[Minibatch],
    loss_fn: LossFn,
    updater: Updater,
    *,
    microbatch_size: int,
    reduce: Reduce = identity,
    stop: Callable[[UpdateMetrics], bool] = lambda metrics: False,
) -> list[UpdateMetrics]:
    """Takes one optimizer step per minibatch.

    The loss of a minibatch is (sum over counted tokens of all its microbatches and processes) / denominator, so that
    neither the microbatch size nor the number of processes changes the gradient.

    Args:
        minibatches: what to learn from, in order; may be endless if `stop` ends it.
        loss_fn: the loss of one microbatch, as sums.
        updater: backward passes and steps.
        microbatch_size: sequences per forward and backward pass.
        reduce: sums a tensor over all processes.
        stop: asked after every step, with the same answer on every process.
    """
    history: list[UpdateMetrics] = []
    for minibatch in minibatches:
        updater.optimizer.zero_grad()
        pieces = microbatches(minibatch.experience, microbatch_size)
        tallies, arrays = [], []
        for i, piece in enumerate(pieces):
            columns = occupied(piece.rollout.attention)
            with updater.computing():
                loss = loss_fn(take(piece, slice(None), columns))
                updater.accumulate(loss.objective / minibatch.denominator, last=i == len(pieces) - 1)
            tallies.append({name: tally.detach() for name, tally in loss.metrics.items()})
            arrays.append(_widen(loss.arrays, columns, piece.rollout.mask.shape[1]))
        norm, stepped, seconds = updater.step()
        metrics = UpdateMetrics(
            means=_mean(tallies, reduce) | {name: float(mean) for name, mean in minibatch.means.items()},
            arrays={name: torch.cat([a[name] for a in arrays]) for name in arrays[0]},
            grad_norm=norm,
            stepped=stepped,
            seconds=seconds,
        )
        history.append(metrics)
        if stop(metrics):
            break
    return history


def _widen(arrays: Mapping[str, Tensor], columns: slice, width: int) -> dict[str, Tensor]:
    """Puts `[b, s]` arrays of the columns that were kept back into `[b, width]`, zeros elsewhere."""
    wide = {}
    for name, array in arrays.items():
        wide[name] = array.new_zeros(array.shape[0], width)
        wide[name][:, columns.start : columns.stop - 1] = array
    return wide
