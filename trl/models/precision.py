"""bfloat16 compute on float32 weights: narrow copies of the weights that stand in for them during a pass.

Autocast narrows the weights anew in every forward pass; these copies are made once per optimizer step, and sampling,
scoring and updating compute the same numbers from them. The weights that the optimizer sees stay float32, and so do
gradients once a pass is over, the value head, and what the model itself wants in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from trl.models.trunk import base_language_model

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Below this a pass is all overhead, and narrow numbers cost more than they save.
_WORTHWHILE_PARAMETERS = 10_000_000


class NarrowCopies:
    """bfloat16 stand-ins for the float32 parameters of a model.

    Args:
        model: a model whose parameters may be swapped: on one process, unsharded.
        keep: parts of names of parameters that stay as they are.
    """

    def __init__(self, model: nn.Module, keep: tuple[str, ...] = ("v_head.",)) -> None:
        keep += tuple(f"{part}." for part in getattr(base_language_model(model), "_keep_in_fp32_modules", None) or ())
        self._parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.dtype == torch.float32 and not any(part in f"{name}." for part in keep)
        ]
        self._copies: list[Tensor] = []
        self._gradients: dict[
            int, Tensor
        ] = {}  # float32, by place in the list; kept, so that no step allocates them anew
        self._pending: set[int] = set()  # places whose gradient of this pass is in `_gradients`
        self._active = False
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._widening(place))

    def _widening(self, place: int) -> Callable[[Tensor], None]:
        """A hook that takes a narrow gradient off its parameter as soon as it is there, and adds it up in float32."""

        def hook(parameter: Tensor) -> None:
            narrow = parameter.grad
            if narrow is None or not self._active:
                return
            if place not in self._gradients:
                self._gradients[place] = torch.empty_like(narrow, dtype=torch.float32)
            wide = self._gradients[place]
            if place in self._pending:
                wide += narrow
            else:
                wide.copy_(narrow)
            self._pending.add(place)
            parameter.grad = None

        return hook

    def refresh(self) -> None:
        """Narrows the weights as they are now."""
        if self._active:
            raise RuntimeError("the weights cannot be narrowed while their copies stand in for them")
        if not self._copies:
            self._copies = [p.detach().to(torch.bfloat16) for p in self._parameters]
            return
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter.detach())

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Computes with the copies as they were last refreshed; gradients are float32 afterwards.

        Forward and backward pass of a microbatch both belong inside. Gradients add to those that are there.
        """
        if self._active:
            yield
            return
        wide = [parameter.data for parameter in self._parameters]
        before = [parameter.grad for parameter in self._parameters]
        # What a pass before this one left in our own buffer is added to there.
        self._pending = {place for place, grad in enumerate(before) if grad is not None and self._is_ours(place, grad)}
        self._active = True
        try:
            for parameter, copy in zip(self._parameters, self._copies, strict=True):
                parameter.grad = None
                parameter.data = copy
            yield
        finally:
            self._active = False
            for place, (parameter, data) in enumerate(zip(self._parameters, wide, strict=True)):
                parameter.data = data
                parameter.grad = self._sum(place, before[place])

    def _sum(self, place: int, before: Tensor | None) -> Tensor | None:
        """The gradient of a parameter after a pass, `before` being the one that it had."""
        if place not in self._pending:
            return before
        wide = self._gradients[place]
        return wide if before is None or before is wide else before.add_(wide)

    def _is_ours(self, place: int, gradient: Tensor) -> bool:
        return self._gradients.get(place) is gradient


def narrow_for_good(model: nn.Module, keep: tuple[str, ...] = ("v_head.",), besides: nn.Module | None = None) -> None:
    """Turns the float32 parameters of a frozen model into bfloat16, but those that it shares with `besides`."""
    shared = {id(parameter) for parameter in besides.parameters()} if besides is not None else set()
    keep += tuple(f"{part}." for part in getattr(base_language_model(model), "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        wide = parameter.dtype == torch.float32 and id(parameter) not in shared
        if wide and not any(part in f"{name}." for part in keep):
            parameter.data = parameter.data.to(torch.bfloat16)


def choose_dtype(model: nn.Module, wanted: ComputeDtype) -> tuple[torch.dtype, str]:
    """What to compute in, and why.

    "auto" is a function of the model and the hardware alone, never of a measurement: a run that is resumed computes as
    it did before.

    Args:
        model: its float32 parameters are what could be narrowed.
        wanted: "float32", "bfloat16", or "auto": bfloat16 where the processor multiplies such matrices faster and the
            model is large enough to gain.
    """
    if wanted == "float32":
        return torch.float32, "asked for"
    if wanted == "bfloat16":
        return torch.bfloat16, "asked for"
    parameters = [p for p in model.parameters() if p.dtype == torch.float32]
    if not parameters:
        return torch.float32, "no parameter is float32: the model computes in its own dtype"
    size = sum(p.numel() for p in parameters)
    if size < _WORTHWHILE_PARAMETERS:
        return torch.float32, f"{size:,} parameters are too few to gain"
    device = parameters[0].device
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (
            (torch.bfloat16, "the GPU has bfloat16 units") if fast else (torch.float32, "the GPU has no bfloat16 units")
        )
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        if able.get("amx_bf16") or able.get("avx512_bf16"):
            return torch.bfloat16, "the CPU has bfloat16 instructions"
        return torch.float32, "the CPU has no bfloat16 instructions"
    return torch.float32, f"bfloat16 on {device.type} is not chosen automatically"
