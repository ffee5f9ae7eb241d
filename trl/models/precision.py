"""bfloat16 compute on float32 weights: narrow copies of the weights that stand in for them during a pass.

Autocast narrows the weights anew in every forward pass; these copies are made once per optimizer step, and sampling,
scoring and updating compute the same numbers from them. The weights that the optimizer sees stay float32, and so do the
value head and what the model itself wants in float32. Gradients are float32 once a pass is over, or, where one pass makes
all of a step's gradient, stay bfloat16 in the place of the copies, which that pass was the last to need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from trl.models.adapters import stands_on_frozen_base
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
        self._parameters = list(_narrowable(model, keep))
        self._places: dict[Tensor, int] = {parameter: place for place, parameter in enumerate(self._parameters)}
        self._copies: list[Tensor] = []
        self._versions: list[int] = []  # of the parameters, when they were narrowed
        self._gradients: dict[
            int, Tensor
        ] = {}  # float32, by place in the list; kept, so that no step allocates them anew
        self._pending: set[int] = set()  # places whose gradient of this pass is in `_gradients`
        self._in_place: set[int] = set()  # places whose gradient of this pass goes where their copy is
        self._held: set[int] = set()  # places where a gradient is, or a part of one, and no copy
        self._active = False
        self._watch()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Copies and pickles of parameters come without their hooks."""
        vars(self).update(state)
        self._watch()

    def _watch(self) -> None:
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._taking(place))

    def _taking(self, place: int) -> Callable[[Tensor], None]:
        """A hook that takes a narrow gradient off its parameter as soon as it is there: to its copy's place, or widened.

        Autograd comes here when every node that reads the parameter has run.
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
                # Not through the parameter, whose version autograd checks: nodes that have run do not read it again.
                self._copies[place].copy_(narrow)
            else:
                self._widen(place, narrow)
            parameter.grad = None

        return hook

    def _widen(self, place: int, narrow: Tensor) -> None:
        """Adds a gradient up in float32."""
        if place not in self._gradients:
            self._gradients[place] = torch.empty_like(narrow, dtype=torch.float32)
        wide = self._gradients[place]
        if place in self._pending:
            wide += narrow
        else:
            wide.copy_(narrow)
        self._pending.add(place)

    def refresh(self) -> None:
        """Narrows the weights as they are now."""
        if not self._copies:
            self._copies = [torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in self._parameters]
            self._versions = [-1] * len(self._parameters)
        self._narrow(range(len(self._parameters)))

    def refresh_changed(self) -> None:
        """The same, of those weights alone that were written to since, other than through `.data`."""
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
        """The bfloat16 gradients that stand in the place of copies, by parameter."""
        return {self._parameters[place]: self._copies[place] for place in sorted(self._held)}

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Puts the copies back where gradients stand: those of `parameters`, or all."""
        places = {self._places[p] for p in parameters if p in self._places} if parameters is not None else self._held
        self._narrow(places & self._held)

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        """Takes note that somebody has narrowed `parameters`, as they are now, into what `gradients` returned."""
        for place in (self._places[parameter] for parameter in parameters):
            self._held.discard(place)
            self._versions[place] = self._parameters[place]._version

    @contextmanager
    def stand_in(self, *, gradients_in_place: bool = False) -> Iterator[None]:
        """Computes with the copies as they were last refreshed.

        Forward and backward pass of a microbatch both belong inside. Gradients are float32 afterwards, and add to those
        that are there.

        Args:
            gradients_in_place: leave the gradients of parameters that have none in bfloat16, in the place of the copies:
                `gradients` returns them until the copies are refreshed or stand in again.
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
        # What a pass before this one left in our own buffer is added to there.
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
    for parameter in _narrowable(model, keep):
        if id(parameter) not in shared:
            parameter.data = parameter.data.to(torch.bfloat16)


def narrow_base(model: nn.Module, keep: tuple[str, ...] = ("v_head.",)) -> list[nn.Parameter]:
    """Turns the float32 weights that a LoRA adapter stands on into bfloat16: they are never written to, nor saved.

    Only where the model still works outside of `NarrowCopies.stand_in`, with its adapter in float32 on a bfloat16 base.

    Returns:
        What was narrowed.
    """
    if not stands_on_frozen_base(model):
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    base = [p for p in _narrowable(model, keep) if not p.requires_grad and "lora_" not in names[id(p)]]
    for parameter in base:
        parameter.data = parameter.data.to(torch.bfloat16)
    return base


def _narrowable(model: nn.Module, keep: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """The float32 parameters, without those whose names have a part in `keep` and those that the model wants so."""
    keep += tuple(f"{part}." for part in getattr(base_language_model(model), "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not any(part in f"{name}." for part in keep):
            yield parameter


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
