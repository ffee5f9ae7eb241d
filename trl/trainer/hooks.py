"""Hooks that a subclass of `PPOTrainer` may override, called in the signatures of TRL 0.4 to 0.11.

Since TRL 0.5, `loss` and `train_minibatch` receive advantages and returns instead of rewards. TRL 0.7 added masks and a
third result of `compute_rewards`. The parameters of an override tell which signature it expects.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from trl.models import reference_mode
from trl.training.running_moments import RunningMoments

logger = logging.getLogger(__name__)
UNSET: Any = ...  # marks an omitted argument where None is a value

# Order of the arguments in TRL 0.4.6, and from 0.5 on.
_OLD_ORDER = {
    "loss": ("old_logprobs", "values", "rewards", "logits", "vpreds", "logprobs", "mask"),
    "train_minibatch": ("old_logprobs", "values", "rewards", "logprobs", "logits", "vpreds", "mask"),
}
_NEW_ORDER = {
    "loss": ("old_logprobs", "values", "logits", "vpreds", "logprobs", "mask", "advantages", "returns"),
    "train_minibatch": ("old_logprobs", "values", "logprobs", "logits", "vpreds", "mask", "advantages", "returns"),
}
# Methods that TRL called and this library does not, each with what to do instead of overriding it.
_NEVER_CALLED = {
    "_prepare_deepspeed": "configure DeepSpeed through accelerate, which prepares the reference, too",
    "_set_signature_columns_if_needed": "override _remove_unused_columns, or pass remove_unused_columns=False",
}


# Helpers of TRL's trainer that are missing here, each with its replacement.
NOT_HERE = {
    "_filter_kwargs": "inspect.signature; TRL never called it",
    "_prepare_deepspeed": "accelerate, which prepares the reference, too",
    "_set_signature_columns_if_needed": "config.remove_unused_columns",
    "_show_tokens": "tokenizer.convert_ids_to_tokens; TRL never called it",
    "_signature_columns": "inspect.signature(model.forward)",
    "_tag_names": "create_model_card, which writes the tags",
    "compare_step": "config.compare_steps; the count is part of state_dict()",
    "push_to_hub_kwargs": "config.push_to_hub_if_best_kwargs",
}
# Attributes of TRL's trainer, built on first use, since a client's own `step` may read them.
_OLD_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "highest_reward": lambda trainer: trainer._trl_highest_score,
    "is_using_text_environment": lambda trainer: False,
    "model_params": lambda trainer: filter(lambda p: p.requires_grad, trainer.model.parameters()),
    "optional_peft_ctx": lambda trainer: (
        partial(reference_mode, trainer.model) if trainer.is_peft_model else nullcontext
    ),
    "processing_class": lambda trainer: trainer.tokenizer,
    "running": lambda trainer: vars(trainer).setdefault("running", RunningMoments(trainer.accelerator)),
}
# Attributes of this library that are stored under a private name, so that a subclass may reuse the public one.
_PUBLIC = ("algorithm", "compute", "fingerprints", "guards", "recipe", "score_moments", "stats_prefix")


def old_attribute(trainer: Any, name: str) -> Any:
    """Looks up a missing attribute of `trainer`: one of TRL's trainer, or the public name of a private one.

    Raises:
        AttributeError: if it is neither; the message says what to use instead of one that TRL had.
    """
    if name in _OLD_ATTRIBUTES:
        return _OLD_ATTRIBUTES[name](trainer)
    if name in _PUBLIC:
        return getattr(trainer, "_trl_choices" if name == "algorithm" else f"_trl_{name}")
    instead = f": use {NOT_HERE[name]}" if name in NOT_HERE else ""
    raise AttributeError(f"{type(trainer).__name__} has no attribute {name}{instead}")


def is_overridden(trainer: Any, base: type, *names: str) -> bool:
    """Whether a subclass of `base`, or the instance `trainer` itself, overrides any of these methods."""
    return any(name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name) for name in names)


def check_overrides(trainer: Any, base: type) -> None:
    """Checks that no subclass of `base` defines a method that TRL called and this library never calls.

    Raises:
        TypeError: if one does.
    """
    kinds = type(trainer).__mro__
    own = [
        vars(trainer),
        *map(vars, kinds[: kinds.index(base)]),
    ]  # excludes later bases, such as transformers.Trainer
    for name, remedy in _NEVER_CALLED.items():
        if any(name in names for names in own):
            raise TypeError(f"{type(trainer).__name__} defines {name}, which is never called here: {remedy}")


def takes(method: Callable[..., Any], name: str) -> bool:
    """Whether `method` has a parameter of this name."""
    return name in inspect.signature(method).parameters


def in_either_order(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `loss` or `train_minibatch` be called in the argument order of TRL 0.4.6 or of 0.5 to 0.11."""
    order = _NEW_ORDER[method.__name__]

    @wraps(method)
    def ordered(self: Any, *args: Any, **kwargs: Any) -> Any:
        by_keyword = "rewards" not in kwargs and {"advantages", "returns"} <= kwargs.keys()
        if len(args) == len(order) or (by_keyword and len(args) == len(order) - 2):
            args, kwargs = (), dict(zip(order, args, strict=False)) | {"rewards": None} | kwargs
        return method(self, *args, **kwargs)

    ordered.orders = (_OLD_ORDER[method.__name__], order)  # type: ignore[attr-defined]  # for docs/compat.md
    return ordered


def model_or_queries_first(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `_generate_batched` be called with the model first, as in TRL 0.7, or without it, as before."""

    @wraps(method)
    def ordered(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "model" not in kwargs and not (args and isinstance(args[0], nn.Module)):
            args = (self.model, *args)
        return method(self, *args, **kwargs)

    older = [name for name in inspect.signature(method).parameters if name not in ("self", "model")]
    ordered.orders = (older, [name for name in older if name != "remove_padding"])  # type: ignore[attr-defined]
    return ordered


def is_newer(trainer: Any, base: type, name: str) -> bool:
    """Whether an override of `loss` or `train_minibatch` takes advantages and returns, as from TRL 0.5 on.

    It does if it has a parameter `advantages`, if its third one is not the rewards, or if it needs eight. An override
    of `*args` alone, or one that only passes on what the trainer's own takes, is called in the order of TRL 0.4.6.
    """
    method = getattr(trainer, name)
    own = inspect.unwrap(getattr(base, name))
    if not is_overridden(trainer, base, name) or inspect.unwrap(getattr(method, "__func__", method)) is own:
        return False
    parameters = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in parameters]
    third = _OLD_ORDER[name][2:3] == ("rewards",) and len(names) > 2 and names[2] in ("logits", "logprobs")
    return (
        "advantages" in names or third or len([p for p in parameters if p.default is p.empty]) == len(_NEW_ORDER[name])
    )


def call_in_order(trainer: Any, base: type, name: str, values: Mapping[str, Tensor | None]) -> Any:
    """Calls `loss` or `train_minibatch` in the argument order that it expects."""
    method = getattr(trainer, name)
    if is_newer(trainer, base, name):
        return method(*(values[argument] for argument in _NEW_ORDER[name]))
    return method(*(values[argument] for argument in _OLD_ORDER[name]))


def call_rewards(trainer: Any, *arguments: Any, **more: Tensor) -> tuple[Tensor, Tensor]:
    """Calls `compute_rewards`, which returns rewards and their KL penalty and, since TRL 0.7, the KL.

    Raises:
        ValueError: if there are token rewards and the override does not take them.
    """
    method = trainer.compute_rewards
    parameters = inspect.signature(method).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "token_rewards" in more and "token_rewards" not in parameters and not takes_any:
        raise ValueError(
            f"compute_rewards of {type(trainer).__name__} takes no token_rewards, which this step has: add the argument"
        )
    given = {name: value for name, value in more.items() if name in parameters or takes_any}
    trainer._trl_exact_kl = more.get("kl")  # for super().compute_rewards, if the override takes none
    try:
        results = method(*arguments, **given)
    except (ValueError, IndexError) as error:
        if trainer._trl_returns_kl or not (
            "expected 3, got 2" in str(error) or "tuple index out of range" in str(error)
        ):
            raise
        # An override of TRL 0.7 to 0.11 took three results from super().compute_rewards.
        logger.info("compute_rewards returns rewards, KL penalty and KL from here on, as in TRL 0.7 to 0.11")
        trainer._trl_returns_kl = True
        results = method(*arguments, **given)
    finally:
        trainer._trl_exact_kl = None
    return results[0], results[1]


def call_safety_checker(trainer: Any, *arguments: Any, masks: Any) -> tuple[Any, Any, Any, Any]:
    """Calls `_step_safety_checker`, with masks where it takes them; returns queries, responses, scores and masks."""
    if not takes(trainer._step_safety_checker, "masks"):
        return (*trainer._step_safety_checker(*arguments), masks)
    checked = trainer._step_safety_checker(*arguments, masks)
    return checked if len(checked) == 4 else (*checked, masks)


def call_generate_batched(trainer: Any, model: Any, queries: list[Tensor], **arguments: Any) -> Any:
    """Calls `_generate_batched`, whose first argument is the model since TRL 0.7.

    Raises:
        ValueError: if it takes no model and `model` is not the policy.
    """
    if takes(trainer._generate_batched, "model"):
        return trainer._generate_batched(model, queries, **arguments)
    if model is not trainer.model:
        raise ValueError(
            f"_generate_batched of {type(trainer).__name__} takes no model, so it cannot sample the reference"
        )
    return trainer._generate_batched(queries, **arguments)
