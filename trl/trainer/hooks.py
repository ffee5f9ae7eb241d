"""Hooks that a subclass of `PPOTrainer` may override, called in the signatures of TRL 0.4 to 0.11.

TRL 0.5 moved the advantages out of `loss`: from then on `loss` and `train_minibatch` were given advantages and returns in place of
rewards. TRL 0.7 added masks, and a third result of `compute_rewards`. An override says by its parameters which one it is.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)
UNSET = object()  # an argument that is not given, where None is a value

# Order of the arguments in TRL 0.4.6, and from 0.5 on.
_OLD_ORDER = {
    "loss": ("old_logprobs", "values", "rewards", "logits", "vpreds", "logprobs", "mask"),
    "train_minibatch": ("old_logprobs", "values", "rewards", "logprobs", "logits", "vpreds", "mask"),
}
_NEW_ORDER = {
    "loss": ("old_logprobs", "values", "logits", "vpreds", "logprobs", "mask", "advantages", "returns"),
    "train_minibatch": ("old_logprobs", "values", "logprobs", "logits", "vpreds", "mask", "advantages", "returns"),
}
# Methods that TRL called and this library does not: what to do instead of overriding them.
_NEVER_CALLED = {
    "_prepare_deepspeed": "configure DeepSpeed through accelerate, which prepares the reference, too",
    "_set_signature_columns_if_needed": "override _remove_unused_columns, or pass remove_unused_columns=False",
}


# Attributes and helpers of TRL's trainer that this one does not have: what to use.
NOT_HERE = {
    "_filter_kwargs": "inspect.signature; TRL never called it",
    "_prepare_deepspeed": "accelerate, which prepares the reference, too",
    "_set_signature_columns_if_needed": "config.remove_unused_columns",
    "_show_tokens": "tokenizer.convert_ids_to_tokens; TRL never called it",
    "_signature_columns": "inspect.signature(model.forward)",
    "_tag_names": "create_model_card, which writes the tags",
    "compare_step": "config.compare_steps; the count is part of state_dict()",
    "highest_reward": "state_dict()['highest_score']",
    "is_using_text_environment": "step(response_masks=...)",
    "model_params": "[p for p in trainer.model.parameters() if p.requires_grad]",
    "optional_peft_ctx": "trl.models.reference_mode(trainer.model)",
    "push_to_hub_kwargs": "config.push_to_hub_if_best_kwargs",
    "running": "score_moments",
}


def is_overridden(trainer: Any, base: type, *names: str) -> bool:
    """Whether a subclass of `base`, or the instance `trainer` itself, overrides any of these methods."""
    return any(name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name) for name in names)


def check_overrides(trainer: Any) -> None:
    """Checks that no class defines a method that TRL called and this library never would.

    Raises:
        TypeError: if one does.
    """
    for name, remedy in _NEVER_CALLED.items():
        if hasattr(trainer, name):
            raise TypeError(f"{type(trainer).__name__} defines {name}, which is never called here: {remedy}")


def takes(method: Callable[..., Any], name: str) -> bool:
    """Whether `method` has a parameter of this name."""
    return name in inspect.signature(method).parameters


def in_either_order(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the trainer's own `loss` or `train_minibatch` be called in the order of TRL 0.4.6 or in that of 0.5 to 0.11."""
    order = _NEW_ORDER[method.__name__]

    @wraps(method)
    def ordered(self: Any, *args: Any, **kwargs: Any) -> Any:
        by_keyword = "rewards" not in kwargs and {"advantages", "returns"} <= kwargs.keys()
        if len(args) == len(order) or (by_keyword and len(args) == len(order) - 2):
            args, kwargs = (), dict(zip(order, args, strict=False)) | {"rewards": None} | kwargs
        return method(self, *args, **kwargs)

    ordered.orders = (_OLD_ORDER[method.__name__], order)  # type: ignore[attr-defined]  # for docs/compat.md
    return ordered


def is_newer(trainer: Any, base: type, name: str) -> bool:
    """Whether an override of `loss` or `train_minibatch` is given advantages and returns, as from TRL 0.5 on."""
    return is_overridden(trainer, base, name) and takes(getattr(trainer, name), "advantages")


def call_in_order(trainer: Any, base: type, name: str, values: Mapping[str, Tensor | None]) -> Any:
    """Calls `loss` or `train_minibatch` in the order that it has, the trainer's own with the advantages as well."""
    method = getattr(trainer, name)
    if is_newer(trainer, base, name):
        return method(*(values[argument] for argument in _NEW_ORDER[name]))
    arguments = [values[argument] for argument in _OLD_ORDER[name]]
    if is_overridden(trainer, base, name):
        return method(*arguments)
    return method(*arguments, advantages=values["advantages"], returns=values["returns"])


def call_rewards(trainer: Any, *arguments: Any, **more: Tensor) -> tuple[Tensor, Tensor]:
    """Calls `compute_rewards`, which returns rewards and their KL penalty, and from TRL 0.7 on the KL as well.

    Raises:
        ValueError: if it takes no `kl` or `token_rewards`, and there are some.
    """
    method = trainer.compute_rewards
    parameters = inspect.signature(method).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if missing := [name for name in more if name not in parameters and not takes_any]:
        raise ValueError(
            f"compute_rewards of {type(trainer).__name__} takes no {', '.join(missing)}, which this step has (kl for "
            "kl_penalty='full', token_rewards for rewards of single tokens): add it"
        )
    try:
        results = method(*arguments, **more)
    except ValueError as error:
        if "expected 3, got 2" not in str(error):
            raise
        # An override of TRL 0.7 to 0.11 unpacked three results of super().compute_rewards.
        logger.info("compute_rewards returns rewards, KL penalty and KL from here on, as in TRL 0.7 to 0.11")
        trainer._trl_returns_kl = True
        results = method(*arguments, **more)
    return results[0], results[1]


def call_safety_checker(trainer: Any, *arguments: Any, masks: Any) -> tuple[Any, Any, Any, Any]:
    """Calls `_step_safety_checker`, with masks where it takes them; returns queries, responses, scores and masks."""
    if not takes(trainer._step_safety_checker, "masks"):
        return (*trainer._step_safety_checker(*arguments), masks)
    checked = trainer._step_safety_checker(*arguments, masks)
    return checked if len(checked) == 4 else (*checked, masks)


def call_generate_batched(trainer: Any, model: Any, queries: list[Tensor], **arguments: Any) -> Any:
    """Calls `_generate_batched`, whose first argument is the model from TRL 0.7 on.

    Raises:
        ValueError: if it takes no model, and is to sample from another than the policy.
    """
    if takes(trainer._generate_batched, "model"):
        return trainer._generate_batched(model, queries, **arguments)
    if model is not trainer.model:
        raise ValueError(
            f"_generate_batched of {type(trainer).__name__} takes no model, so it cannot sample the reference"
        )
    return trainer._generate_batched(queries, **arguments)
