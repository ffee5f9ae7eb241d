"""The optimisation loop shared by all algorithms; the only place that calls `.backward(`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from trl.errors import is_out_of_memory
from trl.kernels.streaming_adam import adam_step, can_stream, total_norm
from trl.protocols import LossFn, Reduce
from trl.training.compute import Passes
from trl.training.guards import UpdateGuards
from trl.training.optimizers import inner
from trl.types import E, Experience, Minibatch, Tally, identity, occupied, take, widen


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """Metrics of one optimizer step."""

    means: dict[str, float]  # means over the counted tokens of all processes, by statistics key
    arrays: dict[str, Tensor]  # [b, S] on this process, by statistics key
    grad_norm: float  # before clipping
    stepped: bool  # False if a loss or gradient was not finite
    seconds: float  # duration of the optimizer step


@dataclass(kw_only=True)
class Updater:
    """Backward passes and optimizer steps of one model.

    Gradients are summed over microbatches and processes and clipped once. They stay in place after the step, except
    those that `compute` held in bfloat16.
    """

    model: nn.Module
    optimizer: Any
    accelerator: Any
    max_grad_norm: float | None = None
    # Not updated, like parameters missing from the optimizer: their gradients are dropped before the norm is computed.
    frozen: Sequence[nn.Parameter] = field(default_factory=tuple)
    compute: Passes = field(default_factory=Passes)  # dtype and context of forward and backward passes
    guards: UpdateGuards = field(default_factory=UpdateGuards)
    reduce: Reduce = identity  # sums a tensor over all processes
    _finite: Tensor | None = field(default=None, init=False)  # whether all losses since `clear` were finite

    def clear(self) -> None:
        """Drops all gradients, before the first microbatch of a minibatch."""
        self.optimizer.zero_grad()
        self.model.zero_grad()  # also clears weights missing from the optimizer
        self.compute.discard()
        self._finite = None

    def computing(self, *, only: bool) -> AbstractContextManager[Any]:
        """Compute context of a microbatch's forward and backward pass; `only`: it is the minibatch's only one."""
        return self.compute.passes(gradients_in_place=only and can_stream(inner(self.optimizer)))

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a forward and backward pass that all-reduces gradients only in the `last` microbatch."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def accumulate(self, loss: Tensor) -> None:
        """Runs the backward pass of `loss`, which all-reduces gradients unless `exchanging` holds that back.

        Every process must call this the same number of times, even without a counted token, or the all-reduce hangs.
        """
        finite = loss.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        # Data-parallel wrappers average over processes; the objective is a sum over them.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self, experience: Experience | None = None, *, refused: str | None = None) -> tuple[float, bool, float]:
        """Takes an optimizer step; if any process has a non-finite loss or gradient, all processes skip it.

        Args:
            experience: the minibatch behind the gradients, passed on to the `on_skip` hook.
            refused: reason to skip the step although everything is finite, the same on every process.

        Returns:
            Gradient norm before clipping, whether the step was taken, and its duration in seconds.

        Raises:
            NonFiniteError: if too many consecutive steps were skipped.
        """
        started = time.perf_counter()
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        frozen = [*self.frozen, *(p for p in self.model.parameters() if id(p) not in optimized)]
        for parameter in frozen:
            parameter.grad = None
        self.compute.discard(frozen)
        narrow = self.compute.gradients()
        norm, scale = self._clip(narrow)
        finite = torch.ones(()) if self._finite is None else self._finite.float()
        local_finite = math.isfinite(norm) and bool(finite)
        failures = torch.stack([torch.full_like(finite, float(not local_finite)), 1 - finite])
        failed, without_loss = self.reduce(failures).tolist()
        if failed == 0 and refused is None:
            if narrow:
                # As a closure of the optimizer's own step, which updates the rest, so that hooks and schedulers see one
                # step.
                self.optimizer.step(lambda: self._step_narrow(narrow, scale))
            else:
                self.optimizer.step()
            self.compute.weights_changed(counted=bool(narrow))  # third-party optimizers may write through `.data`
            self.guards.stepped()
            return norm, True, time.perf_counter() - started
        self.compute.discard()
        if failed == 0 and refused is not None:
            self._reset_scaler(lower=False)
            self.guards.skipped(norm, refused, experience, counts=False)
            return norm, False, time.perf_counter() - started
        if not math.isfinite(norm):
            reason = f"gradient norm is {norm}"
        else:
            reason = "loss or gradient of another process is not finite" if local_finite else "the loss is not finite"
        loss_scale = self._reset_scaler(lower=True)
        if loss_scale is not None:
            reason += f" at a loss scale of {loss_scale:g}, which is lowered"
        counts = loss_scale is None or loss_scale <= 1 or without_loss > 0
        self.guards.skipped(norm, reason, experience, counts)
        return norm, False, time.perf_counter() - started

    def _reset_scaler(self, *, lower: bool) -> float | None:
        """Readies the fp16 scaler for the next step, at a lower scale on request; returns the scale so far, or None.

        The scaler must be updated after unscaling before it can unscale again.
        """
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return None
        scale = float(scaler.get_scale())
        scaler.update(new_scale=scale * scaler.get_backoff_factor() if lower else scale)
        return scale

    def _clip(self, narrow: Mapping[Tensor, Tensor]) -> tuple[float, float]:
        """Clips gradients in `.grad`; returns the total norm before clipping and the factor for the `narrow` ones."""
        wide = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in wide if p.grad is not None]
        if not narrow and self.max_grad_norm is not None:
            return float(self.accelerator.clip_grad_norm_(wide, self.max_grad_norm)), 1.0
        self.accelerator.unscale_gradients()
        if not narrow:
            return float(nn.utils.get_total_norm(gradients)), 1.0
        norm = total_norm(narrow.values(), gradients)
        if self.max_grad_norm is None:
            return float(norm), 1.0
        nn.utils.clip_grads_with_norm_(wide, self.max_grad_norm, norm)
        return float(norm), float((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def _step_narrow(self, narrow: Mapping[Tensor, Tensor], scale: float) -> None:
        self.compute.narrowed(adam_step(inner(self.optimizer), narrow, scale))


def means_of(tallies: Sequence[Mapping[str, Tally]], reduce: Reduce) -> dict[str, float]:
    """Means by key: sums the tallies over all microbatches and processes, then divides once."""
    names = list(tallies[0])
    table = torch.stack(
        [
            torch.stack([sum((t[name].sum.double() for t in tallies), start=torch.zeros(())) for name in names]),
            torch.stack([sum((t[name].count.double() for t in tallies), start=torch.zeros(())) for name in names]),
        ]
    )
    sums, counts = reduce(table)
    return dict(zip(names, (sums / counts.clamp(min=1)).tolist(), strict=True))


def microbatches(experience: E, size: int) -> list[E]:
    """Splits an experience, in order, into microbatches of at most `size` sequences."""
    return [take(experience, slice(start, start + size)) for start in range(0, len(experience), size)]


def optimize(
    minibatches: Iterable[Minibatch[E]],
    loss_fn: LossFn[E],
    updater: Updater,
    *,
    microbatch_size: int,
    reduce: Reduce = identity,
    stop: Callable[[UpdateMetrics], bool] = lambda metrics: False,
    refuse: Callable[[Mapping[str, float]], str | None] = lambda means: None,
) -> list[UpdateMetrics]:
    """Takes one optimizer step per minibatch.

    The loss of a minibatch is (sum over counted tokens of all its microbatches and processes) / denominator, so that
    neither the microbatch size nor the number of processes changes the gradient. When memory runs out, the minibatch is
    retried with microbatches of half the size, which also applies to later minibatches.

    Args:
        minibatches: training data, in order; may be endless if `stop` ends the loop.
        loss_fn: loss of one microbatch, as sums.
        updater: runs backward passes and optimizer steps.
        microbatch_size: sequences per forward and backward pass.
        reduce: sums a tensor over all processes.
        stop: called after every step; True ends the loop. Must return the same value on every process.
        refuse: given the loss's means, returns the reason to skip the step, or None; the same on every process.

    Returns:
        The metrics of every step.
    """
    history: list[UpdateMetrics] = []
    for minibatch in minibatches:
        tallies, arrays = _gradient(minibatch, loss_fn, updater, microbatch_size, reduce)
        means = means_of(tallies, reduce)
        norm, stepped, seconds = updater.step(minibatch.experience, refused=refuse(means))
        metrics = UpdateMetrics(
            means=means | {name: float(mean) for name, mean in minibatch.means.items()},
            arrays={name: torch.cat([a[name] for a in arrays]) for name in arrays[0]},
            grad_norm=norm,
            stepped=stepped,
            seconds=seconds,
        )
        history.append(metrics)
        if stop(metrics):
            break
    return history


Measured = tuple[list[dict[str, Tally]], list[dict[str, Tensor]]]  # tallies and arrays of each microbatch


def _gradient(
    minibatch: Minibatch[E], loss_fn: LossFn[E], updater: Updater, microbatch_size: int, reduce: Reduce
) -> Measured:
    """Accumulates a minibatch's gradient, halving the microbatch until it fits on every process."""
    single_process = updater.accelerator.num_processes == 1
    while True:
        size = min(updater.guards.microbatch(microbatch_size), len(minibatch.experience))
        updater.clear()
        measured = _gradient_in_pieces(minibatch, loss_fn, updater, size)
        if measured is None:
            updater.clear()  # gradients of the failed attempt take memory too
            if minibatch.denominator.device.type == "cuda":
                torch.cuda.empty_cache()
        if not single_process:
            if measured is None:
                _join_all_reduce(minibatch, loss_fn, updater)
            if float(reduce(minibatch.denominator.new_tensor(float(measured is None)))) > 0:
                measured = None
        if measured is not None:
            return measured
        updater.guards.halve_microbatch(size)


def _gradient_in_pieces(minibatch: Minibatch[E], loss_fn: LossFn[E], updater: Updater, size: int) -> Measured | None:
    """One attempt at a minibatch's gradient; None if out of memory, raising instead if a retry cannot help."""
    single_process = updater.accelerator.num_processes == 1
    pieces = microbatches(minibatch.experience, size)
    tallies, arrays = [], []
    for i, piece in enumerate(pieces):
        last, exchanging = i == len(pieces) - 1, False
        columns = occupied(piece.rollout.attention)
        try:
            with updater.exchanging(last), updater.computing(only=len(pieces) == 1):
                loss = loss_fn(take(piece, slice(None), columns))
                exchanging = last and not single_process
                updater.accumulate(loss.objective / minibatch.denominator)
        except RuntimeError as error:
            # Leaving an all-reduce halfway would hang the other processes.
            cannot_retry = exchanging or isinstance(updater.model, FullyShardedDataParallel | FSDPModule)
            if size == 1 or cannot_retry or not is_out_of_memory(error):
                raise
            return None
        tallies.append({name: tally.detach() for name, tally in loss.metrics.items()})
        width = piece.rollout.mask.shape[1]
        arrays.append({name: widen(array, columns, width) for name, array in loss.arrays.items()})
    return tallies, arrays


def _join_all_reduce(minibatch: Minibatch[E], loss_fn: LossFn[E], updater: Updater) -> None:
    """Joins the other processes' gradient all-reduce with a minimal pass after running out of memory.

    The result is discarded: all processes restart the minibatch.
    """
    if isinstance(updater.model, DistributedDataParallel):
        # DDP syncs buffers in a minibatch's first forward pass, which has already started: do not sync them again.
        updater.model.require_forward_param_sync = False
    row = take(minibatch.experience, slice(0, 1))
    with updater.computing(only=False):
        loss = loss_fn(take(row, slice(None), occupied(row.rollout.attention)))
        updater.accumulate(loss.objective * 0)
