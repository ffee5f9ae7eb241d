"""Names and defaults of settings in other releases of TRL, and error messages for unknown names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Defaults of PPOConfig that TRL 0.7 to 0.11 changed from 0.4.6, and of the settings that they added.
_OF_0_7 = {
    "model_name": "gpt2",
    "query_dataset": "imdb",
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "learning_rate": 1.41e-5,
    "batch_size": 128,
    "mini_batch_size": 128,
    "target_kl": 1.0,
    "ratio_threshold": 10.0,
}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "0.4": {},
    "0.5": {"ratio_threshold": 10.0},
    "0.6": {"ratio_threshold": 10.0},
    **dict.fromkeys(("0.7", "0.8", "0.9", "0.10"), _OF_0_7),
    "0.11": _OF_0_7 | {"query_dataset": "stanfordnlp/imdb"},
}
# Settings introduced in 0.7: a script that sets one of them was written for the defaults above.
SINCE_0_7 = ("exp_name", "query_dataset", "reward_model", "optimize_device_cache", "dataset_num_proc")

# Settings of TRL 1 that are only renamed here: the command line's name and the Python name.
RENAMED: dict[str, tuple[str, str]] = {
    "eval_steps": ("train.eval_every", "train(eval_every=...)"),
    "lora_alpha": ("lora.alpha", "peft.LoraConfig(lora_alpha=...)"),
    "lora_dropout": ("lora.dropout", "peft.LoraConfig(lora_dropout=...)"),
    "lora_r": ("lora.r", "peft.LoraConfig(r=...)"),
    "lora_target_modules": ("lora.target_modules", "peft.LoraConfig(target_modules=...)"),
    "lr_scheduler_type": ("train.schedule", "PPOTrainer(lr_scheduler=...)"),
    "max_completion_length": ("generation.max_new_tokens", "train(generation={'max_new_tokens': ...})"),
    "max_steps": ("train.steps", "train(steps=...)"),
    "model_name_or_path": ("model.name", "from_pretrained"),
    "model_revision": ("model.revision", "from_pretrained(revision=...)"),
    "num_generations": ("ppo.group_size", "group_size"),
    "num_iterations": ("ppo.ppo_epochs", "ppo_epochs"),
    "num_ppo_epochs": ("ppo.ppo_epochs", "ppo_epochs"),
    "output_dir": ("train.run_dir", "train(run_dir=...)"),
    "report_to": ("ppo.log_with", "log_with"),
    "response_length": ("generation.max_new_tokens", "train(generation={'max_new_tokens': ...})"),
    "reward_funcs": ("reward.functions", "train(reward=...)"),
    "reward_weights": ("reward.weights", "train(reward={name: function}) and trl.rewards.as_reward(weights=...)"),
    "save_steps": ("train.save_every", "train(save_every=...)"),
    "save_total_limit": ("train.keep_last", "train(keep_last=...)"),
    "sft_model_path": ("model.name", "from_pretrained"),
    "total_episodes": ("train.episodes", "train(episodes=...)"),
}

# Settings of TRL 1 and earlier ones of this library without an exact equivalent: the nearest of both kinds, in words.
EXPLAINED: dict[str, tuple[str, str]] = {
    "beta": ("ppo.init_kl_coef, or grpo.kl_coef for GRPO", "init_kl_coef, the weight of the KL"),
    "bf16": ("ppo.dtype: bfloat16", "dtype='bfloat16'"),
    "compile": ("nothing: compiled layers made updates no faster",) * 2,
    "dataset_name": ("data.prompts, a file of prompts", "train(prompts), which takes a datasets.Dataset"),
    "epsilon": ("ppo.cliprange, or grpo.clip_range for GRPO", "cliprange"),
    "kl_coef": (
        "ppo.init_kl_coef, with ppo.adap_kl_ctrl: false to keep it fixed",
        "init_kl_coef, with adap_kl_ctrl=False to keep it fixed",
    ),
    "logging_steps": ("nothing: every step is recorded",) * 2,
    "loss_type": ("ppo.loss_denominator, or another algorithm", "loss_denominator, or another algorithm"),
    "max_new_tokens": (
        "generation.max_new_tokens",
        "train(generation={'max_new_tokens': ...}), or an argument of generate",
    ),
    "max_prompt_length": ("nothing: prompts are never cut, and one that is too long is an error",) * 2,
    "num_mini_batches": ("ppo.mini_batch_size and ppo.gradient_accumulation_steps: samples per optimizer step",) * 2,
    "num_train_epochs": ("train.steps or train.episodes", "train(steps=...) or train(episodes=...)"),
    "per_device_train_batch_size": (
        "ppo.mini_batch_size, per forward and backward pass, and ppo.batch_size, per step",
        "mini_batch_size, per forward and backward pass, and batch_size, per call to step",
    ),
    "reward_model_path": (
        "reward: classifier:MODEL, with the label in reward.options",
        "train(reward=trl.rewards.ClassifierReward.from_pretrained(...))",
    ),
    "stop_token": ("ppo.stop_token_ids", "stop_token_ids"),
    "total_ppo_epochs": ("nothing: it follows from steps and batch_size",) * 2,
    "use_peft": ("lora.r, the rank of the adapter", "from_pretrained(peft_config=peft.LoraConfig(...))"),
    "use_vllm": ("nothing: the model samples in this process",) * 2,
}


# Arguments of the trainers of TRL 0.11 to 1, each with its replacement here.
_ARGUMENTS = {
    "args": "config, a PPOConfig",
    "callbacks": "train(callbacks=[...]), which takes a TrainCallback",
    "eval_dataset": "train(eval_prompts=...)",
    "optimizers": "optimizer and lr_scheduler",
    "peft_config": "from_pretrained(peft_config=...)",
    "policy": "model",
    "policy_model": "model",
    "processing_class": "tokenizer",
    "ref_policy": "ref_model",
    "reward_funcs": "train(reward=...)",
    "reward_model": "train(reward=trl.rewards.ClassifierReward.from_pretrained(...))",
    "reward_processing_classes": "nothing: ClassifierReward.from_pretrained loads the tokenizer of its model",
    "tools": "step(..., response_masks=...), which leaves out the tokens that a tool wrote",
    "train_dataset": "train(prompts), which takes a datasets.Dataset",
    "value_model": "nothing: values come from the value head of model",
}


def names_unknown_arguments(constructor: Callable[P, None]) -> Callable[P, None]:
    """Makes a trainer's constructor answer an unknown keyword with the name that was probably meant.

    Raises (in the constructor):
        TypeError: for an unknown keyword; the message names its replacement or the nearest argument.
    """
    known = list(inspect.signature(constructor).parameters)[1:]

    @wraps(constructor)
    def __init__(*args: P.args, **kwargs: P.kwargs) -> None:
        if unknown := [name for name in kwargs if name not in known]:
            kind = type(args[0]).__name__
            told = "; ".join(_explain_argument(name, known) for name in unknown)
            newer = " (docs/migrate/trl-1.md)" if set(unknown) & set(_ARGUMENTS) else ""
            raise TypeError(f"{kind} has {told}{newer}")
        constructor(*args, **kwargs)

    return __init__


def _explain_argument(name: str, known: Sequence[str]) -> str:
    if name in _ARGUMENTS:
        return f"no argument {name}{instead(_ARGUMENTS[name])}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"no argument {name}" + (f": did you mean {close[0]}?" if close else "")


def names_unknown_settings(cls: type[T]) -> type[T]:
    """Makes a dataclass answer an unknown keyword with the name that was probably meant.

    Raises (in the constructor):
        TypeError: for an unknown keyword; the message names its replacement or the nearest field.
    """
    create: Callable[..., None] = cls.__init__

    @wraps(create)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError("; ".join(_explain(cls.__name__, name, known) for name in unknown))
        create(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def instead(replacement: str) -> str:
    """The end of a sentence about an unknown setting: its replacement, or why it needs none."""
    reason = replacement.removeprefix("nothing: ")
    return f": use {replacement}" if reason == replacement else f", and needs none: {reason}"


def _explain(config: str, name: str, known: Sequence[str]) -> str:
    if name in RENAMED or name in EXPLAINED:
        return f"{config} has no setting {name}{instead((RENAMED | EXPLAINED)[name][1])}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{config} has no setting {name}" + (f": did you mean {close[0]}?" if close else "")
