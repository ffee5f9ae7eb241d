"""bfloat16 compute with float32 master weights, through bfloat16 copies that are swapped in for a pass.

Autocast casts the weights again in every forward pass; these copies are made once per optimizer step and shared by
sampling, scoring and updating, so all three compute the same numbers. The optimizer's weights, the value head and the
modules that the model keeps in float32 stay float32. Gradients are float32 after a pass, except that when a single pass
produces a step's whole gradient, it can stay in bfloat16 in the copies' memory, which nothing reads after that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from trl.kernels.products import has_bfloat16
from trl.models.adapters import stands_on_frozen_base
from trl.models.trunk import base_language_model

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Below this size overhead dominates a pass, and bfloat16 costs more than it saves.
_WORTHWHILE_PARAMETERS = 10_000_000


class NarrowCopies:
    """bfloat16 copies of a model's float32 parameters, swapped in for forward and backward passes.

    Args:
        model: a model whose parameters can be swapped: on one process, unsharded.
        keep: substrings of the names of parameters to leave in float32.
    """

    def __init__(self, model: nn.Module, keep: tuple[str, ...] = ("v_head.",)) -> None:
        self._parameters = list(_narrowable(model, keep))
        self._places: dict[Tensor, int] = {parameter: place for place, parameter in enumerate(self._parameters)}
        self._copies: list[Tensor] = []
        self._versions: list[int] = []  # version counters of the parameters when they were last copied
        self._gradients: dict[
            int, Tensor
        ] = {}  # float32, by parameter index; reused, so that steps do not reallocate them
        self._pending: set[int] = set()  # indices whose gradient is accumulated in `_gradients`
        self._in_place: set[int] = set()  # indices whose gradient overwrites their copy in this pass
        self._held: set[int] = set()  # indices whose copy has been overwritten by a gradient, or part of one
        self._active = False
        self._watch()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Registers the gradient hooks again: copying or pickling a parameter drops them."""
        vars(self).update(state)
        self._watch()

    def _watch(self) -> None:
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._taking(place))

    def _taking(self, place: int) -> Callable[[Tensor], None]:
        """Returns a hook that moves a bfloat16 gradient into the copy's memory, or adds it to the float32 gradient.

        Autograd calls it once every node that reads the parameter has run.
        """

        def hook(parameter: Tensor) -> None:
            narrow = parameter.grad
            if narrow is None or not self._active:
                return
            if place in self._in_place:
                if place in self._held:
                    raise RuntimeError(
                        f"a weight of shape {tuple(parameter.shape)} got two gradients in one backward pass, as re-entrant "
                        "checkpointing of shared layers does: use gradient_checkpointing_kwargs={'use_reentrant': False} "
                        "or PPOConfig.dtype='float32'"
                    )
                self._held.add(place)
                # Writing to the parameter itself would bump the version that autograd checks. The copy is safe to
                # overwrite: the nodes that read it have already run.
                self._copies[place].copy_(narrow)
            else:
                self._widen(place, narrow)
            parameter.grad = None

        return hook

    def _widen(self, place: int, narrow: Tensor) -> None:
        """Accumulates a gradient in float32."""
        if place not in self._gradients:
            self._gradients[place] = torch.empty_like(narrow, dtype=torch.float32)
        wide = self._gradients[place]
        if place in self._pending:
            wide += narrow
        else:
            wide.copy_(narrow)
        self._pending.add(place)

    def refresh(self) -> None:
        """Copies the current weights to bfloat16."""
        if not self._copies:
            self._copies = [torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in self._parameters]
            self._versions = [-1] * len(self._parameters)
        self._narrow(range(len(self._parameters)))

    def refresh_changed(self) -> None:
        """Refreshes only the weights written to since the last refresh; misses writes through `.data`."""
        versions = enumerate(self._versions)
        self._narrow({place for place, v in versions if v != self._parameters[place]._version} | self._held)

    def _narrow(self, places: Collection[int]) -> None:
        if self._active:
            raise RuntimeError("the weights cannot be narrowed while their copies stand in for them")
        for place in places:
            self._copies[place].copy_(self._parameters[place].detach())
            self._versions[place] = self._parameters[place]._version
        self._held -= set(places)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Returns the bfloat16 gradients that occupy copies' memory, by parameter."""
        return {self._parameters[place]: self._copies[place] for place in sorted(self._held)}

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Overwrites in-place gradients with fresh copies of the weights: for `parameters`, or for all."""
        places = {self._places[p] for p in parameters if p in self._places} if parameters is not None else self._held
        self._narrow(places & self._held)

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        """Records that the tensors from `gradients` now hold the current `parameters` in bfloat16."""
        for place in (self._places[parameter] for parameter in parameters):
            self._held.discard(place)
            self._versions[place] = self._parameters[place]._version

    @contextmanager
    def stand_in(self, *, gradients_in_place: bool = False) -> Iterator[None]:
        """Swaps in the copies as last refreshed.

        Run a microbatch's forward and backward pass inside. Afterwards gradients are float32, added to existing ones.

        Args:
            gradients_in_place: for parameters without a gradient so far, leave the new gradient in bfloat16 in the
                copy's memory; `gradients` returns it until the next refresh or `stand_in`.
        """
        if self._active:
            yield
            return
        if self._copies:
            self.discard()
        else:
            self.refresh()
        wide = [parameter.data for parameter in self._parameters]
        before = [parameter.grad for parameter in self._parameters]
        # Gradients that an earlier pass left in our buffer keep accumulating there.
        self._pending = {place for place, grad in enumerate(before) if grad is not None and self._is_ours(place, grad)}
        self._in_place = {place for place, grad in enumerate(before) if grad is None} if gradients_in_place else set()
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
        """Returns a parameter's gradient after a pass, given the gradient `before` it."""
        if place not in self._pending:
            return before
        wide = self._gradients[place]
        return wide if before is None or before is wide else before.add_(wide)

    def _is_ours(self, place: int, gradient: Tensor) -> bool:
        return self._gradients.get(place) is gradient


def narrow_for_good(model: nn.Module, keep: tuple[str, ...] = ("v_head.",), besides: nn.Module | None = None) -> None:
    """Casts a frozen model's float32 parameters to bfloat16 in place, except those shared with `besides`."""
    shared = {id(parameter) for parameter in besides.parameters()} if besides is not None else set()
    for parameter in _narrowable(model, keep):
        if id(parameter) not in shared:
            parameter.data = parameter.data.to(torch.bfloat16)


def narrow_base(model: nn.Module, keep: tuple[str, ...] = ("v_head.",)) -> list[nn.Parameter]:
    """Casts the frozen float32 base weights under a LoRA adapter to bfloat16; they are never updated or saved.

    Does nothing unless the model also works outside `NarrowCopies.stand_in`, with a float32 adapter on a bfloat16 base.

    Returns:
        The parameters that were cast.
    """
    if not stands_on_frozen_base(model):
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    base = [p for p in _narrowable(model, keep) if not p.requires_grad and "lora_" not in names[id(p)]]
    for parameter in base:
        parameter.data = parameter.data.to(torch.bfloat16)
    return base


def _narrowable(model: nn.Module, keep: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """Yields the float32 parameters, except those named in `keep` and those the model declares as float32-only."""
    keep += tuple(f"{part}." for part in getattr(base_language_model(model), "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not any(part in f"{name}." for part in keep):
            yield parameter


def choose_dtype(model: nn.Module, wanted: ComputeDtype) -> tuple[torch.dtype, str]:
    """Chooses the compute dtype and returns it with the reason.

    "auto" depends only on the model and the hardware, never on a measurement, so a resumed run computes in the same
    dtype.

    Args:
        model: the model whose float32 parameters would be cast.
        wanted: "float32", "bfloat16", or "auto": bfloat16 if the processor has fast bfloat16 matrix multiplication and
            the model is large enough to benefit.
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
        if has_bfloat16():
            return torch.bfloat16, "the CPU has bfloat16 instructions"
        return torch.float32, "the CPU has no bfloat16 instructions, or this torch does not report them"
    return torch.float32, f"bfloat16 on {device.type} is not chosen automatically"
