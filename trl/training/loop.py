"""The one optimisation loop. `.backward(` appears here and nowhere else."""

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

from trl.kernels.streaming_adam import adam_step, can_stream, total_norm
from trl.protocols import LossFn, Reduce
from trl.training.compute import Passes
from trl.training.guards import UpdateGuards, is_out_of_memory
from trl.training.optimizers import inner
from trl.types import E, Experience, Minibatch, Tally, identity, occupied, take


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """What one optimizer step measured."""

    means: dict[str, float]  # over counted tokens of every process, by statistics key
    arrays: dict[str, Tensor]  # [b, S] of this process, by statistics key
    grad_norm: float  # before clipping
    stepped: bool  # False if a loss or gradient was not finite
    seconds: float  # of the optimizer step


@dataclass(kw_only=True)
class Updater:
    """Backward passes and optimizer steps of one model.

    Gradients are summed over microbatches and processes and clipped once. They are left in place after the step, but for
    those that `compute` held in fewer bits.
    """

    model: nn.Module
    optimizer: Any
    accelerator: Any
    max_grad_norm: float | None = None
    # Keep their values, as parameters that the optimizer does not hold do: their gradients are dropped before the norm is taken.
    frozen: Sequence[nn.Parameter] = field(default_factory=tuple)
    compute: Passes = field(default_factory=Passes)  # in which numbers forward and backward passes are made
    guards: UpdateGuards = field(default_factory=UpdateGuards)
    reduce: Reduce = identity  # sums a tensor over all processes
    _finite: Tensor | None = field(default=None, init=False)  # were all losses since `clear`?

    def clear(self) -> None:
        """Forgets gradients, before the first microbatch of a minibatch."""
        self.optimizer.zero_grad()
        self.model.zero_grad()  # also of weights that the optimizer does not hold
        self.compute.discard()
        self._finite = None

    def computing(self, *, only: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a microbatch, which may be the only one of its minibatch."""
        return self.compute.passes(gradients_in_place=only and can_stream(inner(self.optimizer)))

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass: only the last microbatch of a minibatch exchanges gradients."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. Only the last microbatch of a minibatch exchanges gradients.

        Every process must call this the same number of times, even without a counted token, or the all-reduce hangs.
        """
        finite = loss.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        with self.exchanging(last):
            # Data-parallel wrappers average over processes; the objective is a sum over them.
            self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self, experience: Experience | None = None) -> tuple[float, bool, float]:
        """One optimizer step, or none on any process if a loss or gradient of one is not finite.

        Args:
            experience: what the gradients are of, for whoever looks into a skipped step.

        Returns:
            The norm before clipping, whether the step was taken, and its seconds.

        Raises:
            NonFiniteError: if too many steps in a row were skipped.
        """
        started = time.perf_counter()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        unused = [*self.frozen, *(p for p in self.model.parameters() if id(p) not in held)]
        for parameter in unused:
            parameter.grad = None
        self.compute.discard(unused)
        narrow = self.compute.gradients()
        norm, scale = self._clip(narrow)
        finite = torch.ones(()) if self._finite is None else self._finite.float()
        own = math.isfinite(norm) and bool(finite)
        refused, without_loss = self.reduce(torch.stack([torch.full_like(finite, float(not own)), 1 - finite])).tolist()
        if refused == 0:
            if narrow:
                # From inside the optimizer's own step, which does the rest: hooks and schedulers see one step.
                self.optimizer.step(lambda: self._step_narrow(narrow, scale))
            else:
                self.optimizer.step()
            self.compute.weights_changed(counted=bool(narrow))  # an optimizer of another make may write through `.data`
            self.guards.stepped()
            return norm, True, time.perf_counter() - started
        self.compute.discard()
        if not math.isfinite(norm):
            reason = f"gradient norm is {norm}"
        else:
            reason = "the loss is not finite" if not own else "loss or gradient of another process is not finite"
        loss_scale = self._back_off()
        if loss_scale is not None:
            reason += f" at a loss scale of {loss_scale:g}, which is lowered"
        counts = loss_scale is None or loss_scale <= 1 or without_loss > 0
        self.guards.skipped(norm, reason, experience, counts)
        return norm, False, time.perf_counter() - started

    def _back_off(self) -> float | None:
        """Lowers the loss scale of fp16, on every process alike, and returns what it was; None without a scaler.

        A scaler that unscaled gradients has to be updated before it can do so again.
        """
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return None
        scale = float(scaler.get_scale())
        scaler.update(new_scale=scale * scaler.get_backoff_factor())
        return scale

    def _clip(self, narrow: Mapping[Tensor, Tensor]) -> tuple[float, float]:
        """The norm before clipping, and what is left to multiply the `narrow` gradients by; the others are clipped."""
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


def microbatches(experience: E, size: int) -> list[E]:
    """Cuts an experience into pieces of at most `size` sequences, in order."""
    return [take(experience, slice(start, start + size)) for start in range(0, len(experience), size)]


def optimize(
    minibatches: Iterable[Minibatch[E]],
    loss_fn: LossFn[E],
    updater: Updater,
    *,
    microbatch_size: int,
    reduce: Reduce = identity,
    stop: Callable[[UpdateMetrics], bool] = lambda metrics: False,
) -> list[UpdateMetrics]:
    """Takes one optimizer step per minibatch.

    The loss of a minibatch is (sum over counted tokens of all its microbatches and processes) / denominator, so that
    neither the microbatch size nor the number of processes changes the gradient. Where memory runs out, a minibatch is done
    again in microbatches of half the size, and so are those after it.

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
        tallies, arrays = _gradient(minibatch, loss_fn, updater, microbatch_size, reduce)
        norm, stepped, seconds = updater.step(minibatch.experience)
        metrics = UpdateMetrics(
            means=means_of(tallies, reduce) | {name: float(mean) for name, mean in minibatch.means.items()},
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
    """The gradient of a minibatch, in microbatches that fit into the memory of every process."""
    alone = updater.accelerator.num_processes == 1
    while True:
        size = min(updater.guards.microbatch(microbatch_size), len(minibatch.experience))
        updater.clear()
        measured = _gradient_in_pieces(minibatch, loss_fn, updater, size)
        if measured is None:
            updater.clear()  # what the attempt has accumulated takes room as well
            if minibatch.denominator.device.type == "cuda":
                torch.cuda.empty_cache()
        if not alone:
            if measured is None:
                _stand_in(minibatch, loss_fn, updater)
            if float(reduce(minibatch.denominator.new_tensor(float(measured is None)))) > 0:
                measured = None
        if measured is not None:
            return measured
        updater.guards.halve_microbatch(size)


def _gradient_in_pieces(minibatch: Minibatch[E], loss_fn: LossFn[E], updater: Updater, size: int) -> Measured | None:
    """One attempt; None if this process ran out of memory, unless it cannot do with less: then the error is the caller's."""
    alone = updater.accelerator.num_processes == 1
    pieces = microbatches(minibatch.experience, size)
    tallies, arrays = [], []
    for i, piece in enumerate(pieces):
        last, exchanging = i == len(pieces) - 1, False
        columns = occupied(piece.rollout.attention)
        try:
            with updater.exchanging(last), updater.computing(only=len(pieces) == 1):
                loss = loss_fn(take(piece, slice(None), columns))
                exchanging = last and not alone
                updater.accumulate(loss.objective / minibatch.denominator, last=last)
        except RuntimeError as error:
            # Whoever leaves an exchange of gradients half-way leaves the other processes waiting.
            lost = exchanging or isinstance(updater.model, FullyShardedDataParallel | FSDPModule)
            if size == 1 or lost or not is_out_of_memory(error):
                raise
            return None
        tallies.append({name: tally.detach() for name, tally in loss.metrics.items()})
        arrays.append(_widen(loss.arrays, columns, piece.rollout.mask.shape[1]))
    return tallies, arrays


def _stand_in(minibatch: Minibatch[E], loss_fn: LossFn[E], updater: Updater) -> None:
    """Takes part in the exchange of gradients that the other processes are in or come to, with as little as there is.

    What is exchanged is thrown away: all processes begin the minibatch anew.
    """
    if isinstance(updater.model, DistributedDataParallel):
        # Buffers are exchanged in the first forward pass of a minibatch, which was begun: not a second time.
        updater.model.require_forward_param_sync = False
    one = take(minibatch.experience, slice(0, 1))
    with updater.computing(only=False):
        loss = loss_fn(take(one, slice(None), occupied(one.rollout.attention)))
        updater.accumulate(loss.objective * 0, last=True)


def _widen(arrays: Mapping[str, Tensor], columns: slice, width: int) -> dict[str, Tensor]:
    """Puts `[b, s]` arrays of the columns that were kept back into `[b, width]`, zeros elsewhere."""
    wide = {}
    for name, array in arrays.items():
        wide[name] = array.new_zeros(array.shape[0], width)
        wide[name][:, columns.start : columns.stop - 1] = array
    return wide
