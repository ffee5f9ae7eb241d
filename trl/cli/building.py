"""Builds models, trainer and prompts from settings."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.utils import logging as transformers_logging

import trl.assets
from trl.algorithms import grpo
from trl.cli.places import EMBEDDED_PROMPTS, place_of
from trl.cli.problems import Problem, UsageError, did_you_mean
from trl.cli.resolve import Resolved
from trl.core import set_seed
from trl.data.readers import read_rows
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models.adapters import require_peft
from trl.pretrained import ADAPTER_CONFIG, find_file, load_config, load_tokenizer
from trl.trainer import OnlineTrainer, PPOConfig, PPOTrainer
from trl.training.optimizers import make_adam

_MOST_PROMPTS = 1_000_000  # of a file of which some are held out


def quiet() -> None:
    """Turns off transformers' bars for loading weights."""
    transformers_logging.disable_progress_bar()


def tokenizer(resolved: Resolved) -> Any:
    """The model's tokenizer."""
    model = resolved.section("model")
    setting = "model.name" if model.tokenizer is None else "model.tokenizer"
    with _at(resolved, setting):
        return load_tokenizer(
            place_of(resolved[setting]),
            revision=None if model.tokenizer else model.revision,
            trust_remote_code=model.trust_remote_code,
        )


def model_config(resolved: Resolved, setting: str = "model.name") -> Any:
    """transformers' configuration of a model; reads no weights."""
    model = resolved.section("model")
    with _at(resolved, setting):
        return load_config(
            _base_of(place_of(resolved[setting])),
            revision=model.revision if setting == "model.name" else None,
            trust_remote_code=model.trust_remote_code,
        )


def is_encoder_decoder(place: str) -> bool:
    """Whether a folder or hub id holds an encoder-decoder; of an adapter, its base model."""
    return bool(getattr(load_config(_base_of(place)), "is_encoder_decoder", False))


def _base_of(place: str) -> str:
    """The base model of a folder or hub id with an adapter; otherwise the same folder or id."""
    adapter = find_file(place, ADAPTER_CONFIG, {})
    if adapter is None:
        return place
    return str(json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"])


@contextmanager
def _at(resolved: Resolved, setting: str) -> Iterator[None]:
    """Turns an error of loading into one of the setting that names what is loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError([Problem(text=str(error), where=resolved.place(setting))]) from error


def model(resolved: Resolved, setting: str = "model.name") -> Any:
    """Loads a model with a value head; `model.name` at its revision, with a new adapter if `lora.r` is set."""
    settings, policy = resolved.section("model"), setting == "model.name"
    arguments: dict[str, Any] = {
        "trust_remote_code": settings.trust_remote_code, "allow_pickle": settings.allow_pickle,
    }  # fmt: skip
    if policy and settings.revision is not None:
        arguments["revision"] = settings.revision
    with _at(resolved, setting):
        new_adapter = policy and resolved["lora.r"] is not None
        return wrapped(resolved, place_of(resolved[setting]), new_adapter=new_adapter, setting=setting, **arguments)


def wrapped(
    resolved: Resolved, source: Any, *, new_adapter: bool, setting: str = "model.name", **arguments: Any
) -> Any:
    """A folder, hub id or transformers model with a value head, and with the adapter of `lora` if `new_adapter`."""
    seq2seq = bool(getattr(model_config(resolved, setting), "is_encoder_decoder", False))
    wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    if new_adapter:
        arguments["peft_config"] = lora_config(resolved, "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM")
    return wrapper.from_pretrained(source, **arguments)


def lora_config(resolved: Resolved, task_type: str) -> Any:
    """The adapter of the section `lora`, as peft takes it."""
    adapter = resolved.section("lora")
    return require_peft("lora.r").LoraConfig(
        task_type=task_type,
        r=adapter.r,
        lora_alpha=adapter.alpha or 2 * adapter.r,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )


def trainer(command: str, resolved: Resolved, steps: int) -> OnlineTrainer:
    """The trainer of a command.

    Args:
        command: "ppo" or "grpo".
        resolved: settings.
        steps: steps of the whole run, over which the learning rate runs its course.

    Raises:
        UsageError: if a setting does not fit the model or the algorithm.
    """
    config: PPOConfig = resolved.section("ppo")
    settings = resolved.section("model")
    _check_keywords(resolved)
    set_seed(int(config.seed or 0))  # before the value head is drawn
    policy = model(resolved)
    reference = None if settings.reference is None else model(resolved, "model.reference")
    optimizer, scheduler = _schedule(resolved, config, policy, steps)
    arguments: dict[str, Any] = {
        "config": config, "model": policy, "ref_model": reference, "tokenizer": tokenizer(resolved),
        "num_shared_layers": settings.shared_layers, "optimizer": optimizer, "lr_scheduler": scheduler,
    }  # fmt: skip
    try:
        if command == "ppo":
            return PPOTrainer(**arguments)
        choices = resolved.section("grpo")
        return OnlineTrainer(**arguments, algorithm=grpo(clip_range=choices.clip_range, kl_coef=choices.kl_coef))
    except ValueError as error:
        raise UsageError([resolved.problem(str(error))]) from error


def _schedule(resolved: Resolved, config: PPOConfig, policy: Any, steps: int) -> tuple[Any, Any]:
    """Optimizer and scheduler, or twice None for a constant learning rate."""
    train = resolved.section("train")
    if train.schedule == "constant" and not train.warmup_steps:
        return None, None
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_adam(trained, float(config.learning_rate or 0), narrow=False)
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    scheduler: LambdaLR = get_scheduler(name, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=steps)
    return optimizer, scheduler


def _check_keywords(resolved: Resolved) -> None:
    """Checks the names in `accelerator_kwargs` and `project_kwargs`, which are arguments of accelerate."""
    problems = []
    for name, owner in (("accelerator_kwargs", Accelerator), ("project_kwargs", ProjectConfiguration)):
        known = [parameter for parameter in inspect.signature(owner).parameters if parameter != "kwargs_handlers"]
        for key in resolved[f"ppo.{name}"]:
            if key not in known:
                text = f"{owner.__name__} of accelerate has no argument {key}{did_you_mean(key, known)}"
                problems.append(Problem(text=text, where=resolved.place(f"ppo.{name}.{key}")))
    if problems:
        raise UsageError(problems)


def prompts(resolved: Resolved) -> tuple[Any, Any]:
    """Prompts to train on and to hold out, as `trl.data.load_prompts` takes them; None for no held-out ones."""
    data = resolved.section("data")
    source = trl.assets.prompts() if data.prompts == EMBEDDED_PROMPTS else data.prompts
    held_out = trl.assets.prompts() if data.eval_prompts == EMBEDDED_PROMPTS else data.eval_prompts
    if not data.held_out:
        return source, held_out
    rows = [row for _, row in read_rows(source, max_streamed=_MOST_PROMPTS)]
    if data.held_out >= len(rows):
        raise UsageError([resolved.problem(f"held_out={data.held_out} leaves none of {len(rows)} prompts", "data")])
    return split_off(rows, data.held_out)


def split_off(rows: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """Rows to train on and `count` to hold out, drawn alike for every seed so that runs can be compared."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[count:], rows[:count]


def generation(resolved: Resolved) -> dict[str, Any]:
    """Arguments of `generate`, as `train` takes them."""
    settings = resolved.section("generation")
    found: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "batch_size": settings.batch_size,
    }
    return found | ({} if settings.stop_strings is None else {"stop_strings": settings.stop_strings})
