"""In which numbers passes through a model are made, and what has to happen when its weights change."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trl.kernels.linear import quick_products
from trl.models.precision import ComputeDtype, NarrowCopies, choose_dtype, narrow_base, narrow_for_good

logger = logging.getLogger(__name__)


class Passes:
    """Passes in the numbers that the model is in: what an `Updater` does by itself."""

    def passes(self, *, gradients_in_place: bool = False) -> AbstractContextManager[Any]:
        """Where forward and backward passes belong, with the weights as they were when it was last said that they changed.

        Args:
            gradients_in_place: this pass makes a step's whole gradient, and `gradients` may hold it in fewer bits.
        """
        return nullcontext()

    def gradients(self) -> dict[Tensor, Tensor]:
        """Gradients that are not in `.grad` but here, in bfloat16, by parameter: until they are stepped with, discarded, or lost
        to the next pass.
        """
        return {}

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Forgets those of `parameters`, or all."""

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        """Takes note that these weights stand, narrowed, where `gradients` were."""

    def weights_changed(self, *, counted: bool = False) -> None:
        """Takes note that weights were written to; `counted`: by operations that torch counts in a tensor's version."""


class Compute(Passes):
    """float32 passes as they are, or bfloat16 ones on float32 weights.

    On one process narrow copies stand in for the weights, and the frozen base of an adapter is held narrow; across
    processes, where wrappers own the parameters, it is autocast. A `mixed_precision` of accelerate's, and a model that is not
    float32, are left as they are.

    Args:
        model: the policy, on its device, wrapped for its processes.
        wanted: "auto", "float32" or "bfloat16".
        accelerator: which wrapped it.
    """

    def __init__(self, model: nn.Module, wanted: ComputeDtype, accelerator: Any) -> None:
        self.dtype, reason = choose_dtype(model, wanted)
        self._copies: NarrowCopies | None = None
        self._base: list[nn.Parameter] = []  # held in bfloat16 for good
        self._models = [model]
        self.quick_products = accelerator.device.type == "cpu"  # see trl.kernels.linear; not with compiled layers
        self._device_type = accelerator.device.type
        if accelerator.mixed_precision != "no":
            if wanted == "bfloat16":
                raise ValueError(
                    f"dtype='bfloat16' and accelerate's mixed_precision={accelerator.mixed_precision!r} both say what to "
                    "compute in: leave one of them out"
                )
            self.dtype, reason = torch.float32, f"accelerate's mixed_precision={accelerator.mixed_precision!r} decides"
        elif self.dtype == torch.bfloat16 and accelerator.num_processes == 1:
            self._base = narrow_base(model)
            self._copies = NarrowCopies(model)
        logger.info("passes are computed in %s: %s", str(self.dtype).removeprefix("torch."), reason)
        if self._base:
            size = sum(parameter.numel() for parameter in self._base)
            logger.info(
                "the %s frozen weights under the adapter are held in bfloat16; what is saved is the adapter",
                f"{size:,}",
            )

    @property
    def narrow(self) -> bool:
        """Whether passes are made in bfloat16 by this object."""
        return self.dtype == torch.bfloat16

    def passes(self, *, gradients_in_place: bool = False) -> AbstractContextManager[Any]:
        if any(parameter.requires_grad for parameter in self._base):
            raise RuntimeError(
                "weights under the adapter were frozen when the trainer was made, and are held in bfloat16 for that: set "
                "requires_grad before, or use PPOConfig.dtype='float32', to train them"
            )
        if self._copies is not None:
            return self._copies.stand_in(gradients_in_place=gradients_in_place)
        return torch.autocast(self._device_type, torch.bfloat16) if self.narrow else self._quick()

    def _quick(self) -> AbstractContextManager[None]:
        return quick_products(*self._models) if self.quick_products else nullcontext()

    def fresh_passes(self) -> AbstractContextManager[Any]:
        """The same for passes between which anybody may have changed the weights, in whatever way."""
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
        """Narrows the weights anew, or those alone of which torch has counted a change."""
        if self._copies is not None:
            self._copies.refresh_changed() if counted else self._copies.refresh()

    def adopt_reference(self, reference: nn.Module, policy: nn.Module) -> None:
        """Holds a frozen float32 reference in bfloat16; what it shares with the policy is the policy's."""
        self._models.append(reference)
        if self.narrow:
            narrow_for_good(reference, besides=policy)
