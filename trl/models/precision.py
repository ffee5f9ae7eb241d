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
from trl.models.adapters import trains_only_lora
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
        self._indices: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(self._parameters)}
        self._copies: list[Tensor] = []
        self._versions: list[int] = []  # version counters of the parameters when they were last copied
        # float32, by parameter index; reused, so that steps do not reallocate them
        self._gradients: dict[int, Tensor] = {}
        self._pending: set[int] = set()  # indices whose gradient is accumulated in `_gradients`
        self._in_place: set[int] = set()  # indices whose gradient overwrites their copy in this pass
        self._overwritten: set[int] = set()  # indices whose copy has been overwritten by a gradient, or part of one
        self._active = False
        self._register_hooks()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Registers the gradient hooks again: copying or pickling a parameter drops them."""
        vars(self).update(state)
        self._register_hooks()

    def _register_hooks(self) -> None:
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(index))

    def _gradient_hook(self, index: int) -> Callable[[Tensor], None]:
        """Returns a hook that moves a bfloat16 gradient into the copy's memory, or adds it to the float32 gradient.

        Autograd calls it once every node that reads the parameter has run.
        """

        def hook(parameter: Tensor) -> None:
            narrow = parameter.grad
            if narrow is None or not self._active:
                return
            if index in self._in_place:
                if index in self._overwritten:
                    raise RuntimeError(
                        f"a weight of shape {tuple(parameter.shape)} got two gradients in one backward pass, as "
                        "re-entrant checkpointing of shared layers does: use "
                        "gradient_checkpointing_kwargs={'use_reentrant': False} or PPOConfig.dtype='float32'"
                    )
                self._overwritten.add(index)
                # Writing to the parameter itself would bump the version that autograd checks. The copy is safe to
                # overwrite: the nodes that read it have already run.
                self._copies[index].copy_(narrow)
            else:
                self._widen(index, narrow)
            parameter.grad = None

        return hook

    def _widen(self, index: int, narrow: Tensor) -> None:
        """Accumulates a gradient in float32."""
        if index not in self._gradients:
            self._gradients[index] = torch.empty_like(narrow, dtype=torch.float32)
        wide = self._gradients[index]
        if index in self._pending:
            wide += narrow
        else:
            wide.copy_(narrow)
        self._pending.add(index)

    def refresh(self) -> None:
        """Copies the current weights to bfloat16."""
        if not self._copies:
            self._copies = [torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in self._parameters]
            self._versions = [-1] * len(self._parameters)
        self._narrow(range(len(self._parameters)))

    def refresh_changed(self) -> None:
        """Refreshes only the weights written to since the last refresh; misses writes through `.data`."""
        versions = enumerate(self._versions)
        self._narrow({index for index, v in versions if v != self._parameters[index]._version} | self._overwritten)

    def _narrow(self, indices: Collection[int]) -> None:
        if self._active:
            raise RuntimeError("cannot refresh the bfloat16 copies while they stand in for the weights")
        for index in indices:
            self._copies[index].copy_(self._parameters[index].detach())
            self._versions[index] = self._parameters[index]._version
        self._overwritten -= set(indices)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Returns the bfloat16 gradients that occupy copies' memory, by parameter."""
        return {self._parameters[index]: self._copies[index] for index in sorted(self._overwritten)}

    def discard(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Overwrites in-place gradients with fresh copies of the weights: for `parameters`, or for all."""
        parameters = self._parameters if parameters is None else parameters
        self._narrow({self._indices[p] for p in parameters if p in self._indices} & self._overwritten)

    def narrowed(self, parameters: Iterable[Tensor]) -> None:
        """Records that the tensors from `gradients` now hold the current `parameters` in bfloat16."""
        for index in (self._indices[parameter] for parameter in parameters):
            self._overwritten.discard(index)
            self._versions[index] = self._parameters[index]._version

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
        previous = [parameter.grad for parameter in self._parameters]
        # Gradients that an earlier pass left in our buffer keep accumulating there.
        self._pending = {index for index, grad in enumerate(previous) if grad is not None and self._owns(index, grad)}
        self._in_place = {index for index, grad in enumerate(previous) if grad is None} if gradients_in_place else set()
        self._active = True
        try:
            for parameter, copy in zip(self._parameters, self._copies, strict=True):
                parameter.grad = None
                parameter.data = copy
            yield
        finally:
            self._active = False
            for index, (parameter, data) in enumerate(zip(self._parameters, wide, strict=True)):
                parameter.data = data
                parameter.grad = self._sum(index, previous[index])

    def _sum(self, index: int, previous: Tensor | None) -> Tensor | None:
        """Returns a parameter's gradient after a pass, given its `previous` gradient."""
        if index not in self._pending:
            return previous
        wide = self._gradients[index]
        return wide if previous is None or previous is wide else previous.add_(wide)

    def _owns(self, index: int, gradient: Tensor) -> bool:
        return self._gradients.get(index) is gradient


def narrow_for_good(
    model: nn.Module, keep: tuple[str, ...] = ("v_head.",), shared_with: nn.Module | None = None
) -> None:
    """Casts a frozen model's float32 parameters to bfloat16 in place, except those shared with `shared_with`."""
    shared = {id(parameter) for parameter in shared_with.parameters()} if shared_with is not None else set()
    for parameter in _narrowable(model, keep):
        if id(parameter) not in shared:
            parameter.data = parameter.data.to(torch.bfloat16)


def narrow_base(model: nn.Module, keep: tuple[str, ...] = ("v_head.", "reward_score.")) -> list[nn.Parameter]:
    """Casts the frozen float32 base weights under a LoRA adapter to bfloat16; they are never updated or saved.

    Does nothing unless the model also works outside `NarrowCopies.stand_in`, with a float32 adapter on a bfloat16 base.

    Returns:
        The parameters that were cast.
    """
    if not trains_only_lora(model):
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


def choose_dtype(model: nn.Module, requested: ComputeDtype) -> tuple[torch.dtype, str]:
    """Chooses the compute dtype and returns it with the reason.

    "auto" depends only on the model and the hardware, never on a measurement, so a resumed run computes in the same
    dtype.

    Args:
        model: the model whose float32 parameters would be cast.
        requested: "float32", "bfloat16", or "auto": bfloat16 if the processor has fast bfloat16 matrix multiplication
            and the model is large enough to benefit.
    """
    if requested != "auto":
        return (torch.bfloat16 if requested == "bfloat16" else torch.float32), "as requested"
    parameters = [p for p in model.parameters() if p.dtype == torch.float32]
    if not parameters:
        return torch.float32, "no parameters are float32, so the model computes in its own dtype"
    size = sum(p.numel() for p in parameters)
    if size < _WORTHWHILE_PARAMETERS:
        return torch.float32, f"{size:,} parameters are too few to benefit"
    device = parameters[0].device
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU has bfloat16 units"
        return torch.float32, "the GPU has no bfloat16 units"
    if device.type == "cpu":
        if has_bfloat16():
            return torch.bfloat16, "the CPU has bfloat16 instructions"
        return torch.float32, "the CPU has no bfloat16 instructions, or this torch does not report them"
    return torch.float32, f"bfloat16 on {device.type} is not chosen automatically"
