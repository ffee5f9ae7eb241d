"""Builds models, trainer and prompts from settings."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, get_scheduler
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
from trl.pretrained import ADAPTER_CONFIG, find_file, load_tokenizer
from trl.trainer import OnlineTrainer, PPOConfig, PPOTrainer
from trl.training.optimizers import make_adam

_MOST_PROMPTS = 1_000_000  # of a file of which some are held out


def quiet() -> None:
    """Turns off transformers' bars for loading weights."""
    transformers_logging.disable_progress_bar()


def tokenizer(resolved: Resolved) -> Any:
    """The model's tokenizer."""
    model = resolved.section("model")
    return load_tokenizer(
        place_of(model.tokenizer or model.name),
        revision=None if model.tokenizer else model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def model_config(resolved: Resolved) -> Any:
    """transformers' configuration of the model; reads no weights."""
    model = resolved.section("model")
    return AutoConfig.from_pretrained(
        place_of(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code
    )


def is_encoder_decoder(place: str) -> bool:
    """Whether a folder or hub id holds an encoder-decoder; of an adapter, its base model."""
    adapter = find_file(place, ADAPTER_CONFIG, {})
    if adapter is not None:
        place = str(json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"])
    return bool(getattr(AutoConfig.from_pretrained(place, trust_remote_code=False), "is_encoder_decoder", False))


def model(resolved: Resolved, name: str, revision: str | None, *, lora: bool) -> Any:
    """A language model with a value head, with a new adapter if `lora`."""
    settings = resolved.section("model")
    seq2seq = bool(getattr(model_config(resolved), "is_encoder_decoder", False))
    wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    arguments: dict[str, Any] = {
        "revision": revision, "trust_remote_code": settings.trust_remote_code, "allow_pickle": settings.allow_pickle,
    }  # fmt: skip
    adapter = resolved.section("lora")
    if lora and adapter.r is not None:
        arguments["peft_config"] = require_peft("lora.r").LoraConfig(
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
            r=adapter.r,
            lora_alpha=adapter.alpha or 2 * adapter.r,
            lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
        )
    return wrapper.from_pretrained(place_of(name), **{k: v for k, v in arguments.items() if v is not None})


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
    policy = model(resolved, settings.name, settings.revision, lora=True)
    reference = None if settings.reference is None else model(resolved, settings.reference, None, lora=False)
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
    random.Random(0).shuffle(rows)  # the same split whatever the seed, so that runs can be compared
    return rows[data.held_out :], rows[: data.held_out]


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
