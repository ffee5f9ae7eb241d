"""In which numbers passes through a model are made, and what has to happen when its weights change."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trl.models.precision import ComputeDtype, NarrowCopies, choose_dtype, narrow_for_good

logger = logging.getLogger(__name__)


class Compute:
    """float32 passes as they are, or bfloat16 ones on float32 weights.

    On one process narrow copies stand in for the weights; across processes, where wrappers own the parameters, it is
    autocast. A `mixed_precision` of accelerate's, and a model that is not float32, are left as they are.

    Args:
        model: the policy, on its device, wrapped for its processes.
        wanted: "auto", "float32" or "bfloat16".
        accelerator: which wrapped it.
    """

    def __init__(self, model: nn.Module, wanted: ComputeDtype, accelerator: Any) -> None:
        self.dtype, reason = choose_dtype(model, wanted)
        self._copies: NarrowCopies | None = None
        self._device_type = accelerator.device.type
        if accelerator.mixed_precision != "no":
            if wanted == "bfloat16":
                raise ValueError(
                    f"dtype='bfloat16' and accelerate's mixed_precision={accelerator.mixed_precision!r} both say what to "
                    "compute in: leave one of them out"
                )
            self.dtype, reason = torch.float32, f"accelerate's mixed_precision={accelerator.mixed_precision!r} decides"
        elif self.dtype == torch.bfloat16 and accelerator.num_processes == 1:
            self._copies = NarrowCopies(model)
        logger.info("passes are computed in %s: %s", str(self.dtype).removeprefix("torch."), reason)

    @property
    def narrow(self) -> bool:
        """Whether passes are made in bfloat16 by this object."""
        return self.dtype == torch.bfloat16

    def passes(self) -> AbstractContextManager[Any]:
        """Where forward and backward passes belong, with the weights as they were when it was last said that they changed."""
        if self._copies is not None:
            return self._copies.stand_in()
        return torch.autocast(self._device_type, torch.bfloat16) if self.narrow else nullcontext()

    def fresh_passes(self) -> AbstractContextManager[Any]:
        """The same for passes between which anybody may have changed the weights."""
        self.weights_changed()
        return self.passes()

    def weights_changed(self) -> None:
        """Narrows the weights anew."""
        if self._copies is not None:
            self._copies.refresh()

    def adopt_reference(self, reference: nn.Module, policy: nn.Module) -> None:
        """Holds a frozen float32 reference in bfloat16; what it shares with the policy is the policy's."""
        if self.narrow:
            narrow_for_good(reference, besides=policy)
