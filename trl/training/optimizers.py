"""Creating and checking optimizers and schedulers, and saving optimizer state by parameter name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LRScheduler

from trl.kernels.streaming_adam import NarrowAdam
from trl.state.encoding import decode, encode


def make_adam(parameters: Sequence[nn.Parameter], learning_rate: float, *, narrow: bool) -> Adam:
    """Creates Adam, fused where torch supports it for these parameters; `narrow` stores its moments in bfloat16.

    Raises:
        ValueError: if `narrow` and a parameter is not float32 on a CPU or CUDA device.
    """
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if not narrow:
        return Adam(parameters, lr=learning_rate, fused=fused)
    if unsupported := {f"{p.dtype} on {p.device.type}" for p in parameters if p.dtype != torch.float32 or not fused}:
        raise ValueError(
            "optimizer_state_dtype='bfloat16' needs float32 weights on a CPU or CUDA device, not "
            f"{', '.join(sorted(unsupported))}"
        )
    return NarrowAdam(parameters, lr=learning_rate, fused=True)


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Rejects an optimizer that holds no trainable parameter or needs a closure.

    Raises:
        ValueError: if it holds none of the model's trainable parameters, or its `step` needs a closure, like LBFGS.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__}.step needs a closure that computes the loss again, which the trainer cannot "
            "do: use an optimizer such as Adam or SGD"
        )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"the given {type(optimizer).__name__} holds none of the model's {len(trained)} trainable parameters: "
            "build it from [p for p in model.parameters() if p.requires_grad], with the model that you pass to the "
            "trainer"
        )


def missing_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters of `model` that are missing from the optimizer, by name."""
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized}


def check_scheduler(scheduler: LRScheduler, optimizer: torch.optim.Optimizer | None) -> None:
    """Rejects a scheduler whose `step` needs arguments, and warns if it drives another optimizer.

    Raises:
        ValueError: if its `step` needs an argument, like ReduceLROnPlateau.
    """
    empty = inspect.Parameter.empty
    needed = [name for name, p in inspect.signature(scheduler.step).parameters.items() if p.default is empty]
    if needed:
        raise ValueError(
            f"lr_scheduler is a {type(scheduler).__name__}, whose step needs {', '.join(needed)}: do not pass it, and "
            "call "
            'its step yourself after each ppo_trainer.step, such as scheduler.step(stats["ppo/mean_scores"])'
        )
    if optimizer is None or inner(scheduler.optimizer) is not inner(optimizer):
        warnings.warn(
            f"the given {type(scheduler).__name__} does not drive the trainer's optimizer and will not change its "
            "learning rate: pass both, with the scheduler built from the optimizer",
            stacklevel=5,
        )


def inner(wrapped: Any) -> Any:
    """Unwraps accelerate's optimizer or scheduler; returns anything else unchanged."""
    if isinstance(wrapped, AcceleratedOptimizer):
        return wrapped.optimizer
    return wrapped.scheduler if isinstance(wrapped, AcceleratedScheduler) else wrapped


# Old class names in earlier checkpoints -> current names.
_RENAMED_CLASSES = {"trl.training.streaming.NarrowAdam": f"{NarrowAdam.__module__}.{NarrowAdam.__qualname__}"}


def kind(value: Any) -> str | None:
    """Fully qualified class name of `value`; None for None."""
    return None if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Settings of each parameter group (learning rate, weight decay, ...), without its parameters."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: dict[str, Tensor],
    *,
    made_with: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns an optimizer's state as JSON and adds its tensors to `tensors` as "parameter/entry".

    Args:
        optimizer: holds parameters of one model.
        named: that model's parameters, by name.
        tensors: receives the tensors, not copied.
        made_with: settings of each group before the run's first step, from `group_settings`.

    Raises:
        ValueError: if the optimizer holds a parameter that is not in `named`.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        "class": kind(optimizer),
        "defaults": encode(optimizer.defaults, "optimizer/defaults", tensors),
        "groups": [
            {
                "parameters": _names(group, i, names),
                "settings": encode(settings, f"optimizer/groups/{i}", tensors),
                "made_with": encode(made_with[i], f"optimizer/made_with/{i}", tensors),
            }
            for i, (group, settings) in enumerate(zip(optimizer.param_groups, group_settings(optimizer), strict=True))
        ],
        "entries": {
            names[id(parameter)]: encode(entries, names[id(parameter)], tensors)
            for parameter, entries in optimizer.state.items()
        },
    }


def _names(group: Mapping[str, Any], i: int, names: Mapping[int, str]) -> list[str]:
    group_names = [names.get(id(parameter)) for parameter in group["params"]]
    if None in group_names:
        shape = tuple(group["params"][group_names.index(None)].shape)
        raise ValueError(f"group {i} of the optimizer holds a parameter of shape {shape} that the model does not have")
    return [name for name in group_names if name is not None]


def optimizer_differences(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> list[str]:
    """Reasons why a saved state does not fit this optimizer; empty if it does."""
    before, now = _RENAMED_CLASSES.get(saved["class"], saved["class"]), kind(optimizer)
    if before != now:
        narrow = _RENAMED_CLASSES["trl.training.streaming.NarrowAdam"] in (before, now)
        hint = " (see PPOConfig.optimizer_state_dtype)" if narrow else ""
        return [f"the optimizer was a {before}, is a {now}{hint}"]
    names = {id(parameter): name for name, parameter in named.items()}
    groups = [_names(group, i, names) for i, group in enumerate(optimizer.param_groups)]
    saved_groups = [group["parameters"] for group in saved["groups"]]
    if len(groups) != len(saved_groups):
        return [f"the optimizer had {len(saved_groups)} parameter groups, has {len(groups)}"]
    reasons = []
    for i, (old, new) in enumerate(zip(saved_groups, groups, strict=True)):
        removed, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        if removed or added:
            reasons.append(
                f"group {i} of the optimizer had {len(old)} parameters, has {len(new)}"
                + (f"; {removed[0]} is gone" if removed else "")
                + (f"; {added[0]} is new" if added else "")
            )
    return reasons


def load_optimizer(
    saved: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensor: Callable[[str], Tensor],
    *,
    scheduled: bool,
) -> list[str]:
    """Loads a saved state into a matching optimizer.

    A group setting that differs from the one at the start of the run, such as a new learning rate, was changed by the
    user and is kept; with a scheduler (`scheduled`), the saved learning rate is restored anyway.

    Returns:
        Remarks on every setting that the user changed.
    """
    remarks = []
    scheduled_names = {"lr", "initial_lr"} if scheduled else set()
    for i, (group, old) in enumerate(zip(optimizer.param_groups, saved["groups"], strict=True)):
        settings = decode(old["settings"], tensor)
        # Older checkpoints hold only the optimizer's defaults.
        then = decode(old.get("made_with", saved["defaults"]), tensor)
        now = group if "made_with" in old else optimizer.defaults
        changed = {name for name in then if name in now and now[name] != then[name]}
        owner = "the optimizer" if len(optimizer.param_groups) == 1 else f"group {i} of the optimizer"
        remarks += [
            f"{owner} was built with {name}={then[name]}, now with {now[name]}: "
            + ("the scheduler's saved state takes precedence" if name in scheduled_names else "the new value is used")
            for name in sorted(changed)
        ]
        group.update({name: value for name, value in settings.items() if name not in changed - scheduled_names})
    optimizer.state.clear()
    fused = {
        id(p): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, entries in saved["entries"].items():
        parameter = named[name]
        optimizer.state[parameter] = {
            key: _on_device(key, value, parameter, fused[id(parameter)])
            for key, value in decode(entries, tensor).items()
        }
    return remarks


def _on_device(key: str, value: Any, parameter: nn.Parameter, fused: bool) -> Any:
    """Moves a state tensor to its parameter's device, except the step count, which unfused Adam keeps on the CPU."""
    if not isinstance(value, Tensor) or (key == "step" and not fused):
        return value
    return value.to(parameter.device)
