"""Compute dtype of forward and backward passes, and keeping bfloat16 copies of the weights in sync."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trl.kernels.linear import fast_linear_layers
from trl.kernels.rms_norm import fused_norms
from trl.models.precision import ComputeDtype, NarrowCopies, choose_dtype, narrow_base, narrow_for_good

logger = logging.getLogger(__name__)


class Passes:
    """Runs passes in the model's own dtype: the default of an `Updater`."""

    def passes(self, *, gradients_in_place: bool = False) -> AbstractContextManager[Any]:
        """Context for forward and backward passes, using the weights as of the last `weights_changed`.

        Args:
            gradients_in_place: this pass computes a step's whole gradient, which `gradients` may hold in bfloat16.
        """
        return nullcontext()

    def gradients(self) -> dict[Tensor, Tensor]:
        """bfloat16 gradients held here instead of in `.grad`, by parameter.

        They are valid until the optimizer step, `discard` or the next pass.
        """
        return {}

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Drops the gradients of `parameters`, or all of them."""

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        """Notes that the buffers of these parameters' `gradients` now hold their updated weights in bfloat16."""

    def weights_changed(self, *, counted: bool = False) -> None:
        """Notes that weights changed; `counted` means only by operations that bump torch's version counter."""


class Compute(Passes):
    """Runs passes in the model's own dtype, or in bfloat16 on float32 weights.

    On one process, bfloat16 copies replace the weights during passes, and the frozen base of an adapter is stored in
    bfloat16; across processes, where wrappers own the parameters, autocast is used instead. Accelerate's
    `mixed_precision` and models that are not float32 are left as they are.

    Args:
        model: the policy, on its device, wrapped for its processes.
        dtype: "auto", "float32" or "bfloat16".
        accelerator: the accelerator that wrapped it.
    """

    def __init__(self, model: nn.Module, dtype: ComputeDtype, accelerator: Any) -> None:
        self.dtype, reason = choose_dtype(model, dtype)
        self._copies: NarrowCopies | None = None
        self._base: list[nn.Parameter] = []  # permanently stored in bfloat16
        self._models = [model]
        self._device_type = accelerator.device.type
        if accelerator.mixed_precision != "no":
            if dtype == "bfloat16":
                raise ValueError(
                    f"dtype='bfloat16' and accelerate's mixed_precision={accelerator.mixed_precision!r} both set the "
                    "compute dtype: set only one of them"
                )
            self.dtype, reason = torch.float32, f"set by accelerate's mixed_precision={accelerator.mixed_precision!r}"
        elif self.dtype == torch.bfloat16 and accelerator.num_processes == 1:
            self._base = narrow_base(model)
            self._copies = NarrowCopies(model)
        logger.info("computing passes in %s: %s", str(self.dtype).removeprefix("torch."), reason)
        if self._base:
            size = sum(parameter.numel() for parameter in self._base)
            logger.info(
                "storing the %s frozen weights under the adapter in bfloat16; checkpoints hold only the adapter",
                f"{size:,}",
            )

    @property
    def narrow(self) -> bool:
        """Whether this object runs passes in bfloat16."""
        return self.dtype == torch.bfloat16

    def passes(self, *, gradients_in_place: bool = False) -> AbstractContextManager[Any]:
        if any(parameter.requires_grad for parameter in self._base):
            raise RuntimeError(
                "weights under the adapter are stored in bfloat16, since they were frozen when the trainer was built: "
                "to train them, set requires_grad before building it, or use PPOConfig.dtype='float32'"
            )
        context: AbstractContextManager[Any] = nullcontext()
        if self._copies is not None:
            context = self._copies.stand_in(gradients_in_place=gradients_in_place)
        elif self.narrow:
            context = torch.autocast(self._device_type, torch.bfloat16)
        elif self._device_type == "cpu":
            context = fast_linear_layers(*self._models)
        return _with_fused_norms(context, self._models) if self._device_type == "cuda" else context

    def fresh_passes(self) -> AbstractContextManager[Any]:
        """`passes` after refreshing the copies, for when other code may have changed the weights in any way."""
        self.weights_changed()
        return self.passes()

    def gradients(self) -> dict[Tensor, Tensor]:
        return {} if self._copies is None else self._copies.gradients()

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        if self._copies is not None:
            self._copies.discard(parameters)

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        if self._copies is not None:
            self._copies.narrowed(parameters)

    def weights_changed(self, *, counted: bool = False) -> None:
        """Refreshes the bfloat16 copies: all, or if `counted` only those whose version counter changed."""
        if self._copies is not None:
            self._copies.refresh_changed() if counted else self._copies.refresh()

    def adopt_reference(self, reference: nn.Module, policy: nn.Module) -> None:
        """Adds the frozen reference; for bfloat16 passes, stores it in bfloat16 except what the policy shares."""
        self._models.append(reference)
        if self.narrow:
            narrow_for_good(reference, shared_with=policy)


@contextmanager
def _with_fused_norms(context: AbstractContextManager[Any], models: Iterable[nn.Module]) -> Iterator[None]:
    with context, fused_norms(*models):
        yield
