"""Saves and restores a trainer's full state, so that a resumed PPO run continues exactly.

The state covers policy and value head, optimizer, scheduler, KL coefficient, running moments, counters, and every
random generator of every process. For a model with an adapter, only trained weights are stored; the base weights and
the reference model are verified by their SHA-256.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl.redaction import redact
from trl.state.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_of,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    versions,
)
from trl.state.encoding import decode, encode, no_tensors
from trl.state.fingerprints import weights
from trl.state.rng import generators_state, set_generators
from trl.state.tensorfile import kind_of
from trl.training.optimizers import inner, kind, load_optimizer, optimizer_differences, optimizer_state
from trl.training.processes import run_together, share_json
from trl.training.run_state import RunState

logger = logging.getLogger(__name__)

POLICY, OPTIMIZER = "policy", "optimizer"
_HEAD = "v_head."
# Settings that must not change when a run resumes.
_FIXED_SETTINGS = ("batch_size",)
# Not saved: they may hold credentials, paths and tracker objects; whatever affects results is recorded elsewhere.
_UNSAVED_SETTINGS = (
    "log_with", "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs",
    # Derived from the others, the model and the processes.
    "backward_batch_size", "world_size", "global_batch_size", "global_backward_batch_size", "is_encoder_decoder",
    "is_peft_model",
)  # fmt: skip


# Saving and loading --------------------------------------------------------------------------------------------------


def save_training(
    trainer: RunState,
    folder: str | Path,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    keep_last: int = 2,
    metric: float | None = None,
    keep_steps: Collection[int] = (),
) -> Path:
    """Saves a trainer with `save_checkpoint`. Every process must call it; the main one writes, all raise together."""
    tensors, state = capture(trainer)
    state["extra"] = dict(extra or {})

    def write() -> Path | None:
        if not trainer.accelerator.is_main_process:
            return None
        return save_checkpoint(folder, step, tensors, state, keep_last=keep_last, metric=metric, keep_steps=keep_steps)

    path = run_together(trainer.accelerator, write, CheckpointError)
    return Path(folder) / share_json(trainer.accelerator, None if path is None else path.name)[0]


def load_training(
    trainer: RunState, folder: str | Path, differences: Callable[[Checkpoint], Sequence[str]] = lambda checkpoint: ()
) -> Checkpoint | None:
    """Restores a trainer from the newest usable checkpoint in a folder.

    Every process must call this; all load the same checkpoint.

    Args:
        trainer: as for `restore`.
        folder: checkpoint folder.
        differences: returns further reasons to reject a checkpoint, in addition to the trainer's own.

    Returns:
        The checkpoint, or None if nothing was ever saved in the folder.
    """
    checkpoint = _load_together(trainer, folder, lambda: load_checkpoint(folder))
    if checkpoint is not None:
        restore(trainer, checkpoint, differences)
    return checkpoint


def load_step(trainer: RunState, folder: str | Path, step: int) -> Checkpoint:
    """Restores a trainer from the checkpoint of a step. Every process must call it."""
    checkpoint = _load_together(trainer, folder, lambda: checkpoint_of(folder, step))
    assert checkpoint is not None
    restore(trainer, checkpoint)
    return checkpoint


def _load_together(trainer: RunState, folder: str | Path, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Loads the checkpoint that the main process finds, on every process; None if it finds none."""
    main = trainer.accelerator.is_main_process
    checkpoint = run_together(trainer.accelerator, lambda: find() if main else None, CheckpointError)
    name = share_json(trainer.accelerator, None if checkpoint is None else checkpoint.path.name)[0]
    if name is None:
        return None

    def read() -> Checkpoint:
        return checkpoint or read_checkpoint(Path(folder) / name, verify=False)  # the main process has verified it

    return run_together(trainer.accelerator, read, CheckpointError)


# Capturing a trainer's state -----------------------------------------------------------------------------------------


def capture(trainer: RunState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Collects everything that the rest of the run depends on. Every process must call this.

    Args:
        trainer: the trainer to save; `RunState` lists what is read.

    Returns:
        Tensors by file and name, and JSON state. The tensors are the trainer's own, not copies: save them before the
        next step.

    Raises:
        ValueError: if the model is sharded over processes, or the optimizer or scheduler holds values that JSON and
            safetensors cannot store.
    """
    check_can_be_saved(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    stored, frozen = _split(model)
    entries: dict[str, Tensor] = {}
    scheduler, scaler = inner(trainer.lr_scheduler), trainer.accelerator.scaler
    trainer_state = {name: value for name, value in trainer.state_dict().items() if name != "minibatch_order"}
    generators = share_json(trainer.accelerator, generators_state(trainer.accelerator.device, trainer._trl_generator))
    state = {
        **_identity(trainer),
        "modes": _modes(model),
        "frozen": trainer._trl_fingerprints.of("policy", frozen),
        "reference": _reference(trainer),
        "optimizer": optimizer_state(
            inner(trainer.optimizer),
            dict(model.named_parameters()),
            entries,
            made_with=trainer._trl_optimizer_made_with,
        ),
        "scheduler": None if scheduler is None else encode(scheduler.state_dict(), "scheduler", entries),
        "scaler": None if scaler is None else encode(scaler.state_dict(), "scaler", entries),
        "ppo": encode(trainer_state, "ppo", entries),
        "generators": generators,
    }
    return {POLICY: stored, OPTIMIZER: entries}, state


def check_can_be_saved(trainer: RunState) -> None:
    """Checks that one process holds the whole model.

    Raises:
        ValueError: if it is sharded over processes.
    """
    distribution = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    if distribution in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"a model sharded over processes by {distribution} cannot be checkpointed: use one process or data "
            "parallelism"
        )


def _split(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a model's weights into those that a checkpoint stores and the frozen adapter base it only fingerprints."""
    everything = weights(model)
    if not model.is_peft_model:
        return everything, {}
    trained = {name for name, p in model.named_parameters() if p.requires_grad or name.startswith(_HEAD)}
    frozen = {name: tensor for name, tensor in everything.items() if name not in trained}
    return {name: everything[name] for name in everything if name in trained}, frozen


def _reference(trainer: RunState) -> dict[str, str] | None:
    """Fingerprints of the reference model, excluding its unused value head; None if it is the policy's base."""
    if trainer.ref_model is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    evaluated = {name: tensor for name, tensor in weights(model).items() if not name.startswith(_HEAD)}
    return trainer._trl_fingerprints.of("reference", evaluated)


def _identity(trainer: RunState) -> dict[str, Any]:
    """Settings and environment to compare between a checkpoint and a trainer."""
    return {
        "config": settings_of(trainer.config),
        "algorithm": trainer._trl_choices,
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "tokenizer_size": len(trainer.tokenizer),
        "scheduler_class": kind(inner(trainer.lr_scheduler)),
    }


def _algorithm(state: Mapping[str, Any]) -> Mapping[str, str]:
    """The algorithm of a checkpoint; PPO if it was saved before version 0.5."""
    return state.get("algorithm", {"name": "ppo"})


def settings_of(config: Any) -> dict[str, Any]:
    """Comparable settings as JSON, with secrets redacted."""
    settings = {}
    for name in (f.name for f in fields(config) if f.name not in _UNSAVED_SETTINGS):
        value = getattr(config, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = [int(item) if isinstance(item, int) else item for item in value]
        if value is None or isinstance(value, bool | int | float | str | list):
            settings[name] = value
    redacted = redact(list(settings.values()))  # one call for all, since each scans the environment
    return {name: encode(value, f"config/{name}", {}) for name, value in zip(settings, redacted, strict=True)}


def _modes(model: torch.nn.Module) -> dict[str, Any]:
    """The model's training mode, and the names of modules in the opposite mode."""
    other = [name for name, module in model.named_modules() if module.training != model.training]
    return {"training": model.training, "other": other}


# Restoring a trainer -------------------------------------------------------------------------------------------------


def restore(
    trainer: RunState,
    checkpoint: Checkpoint,
    differences: Callable[[Checkpoint], Sequence[str]] = lambda checkpoint: (),
) -> None:
    """Restores a trainer to the state in `checkpoint`. Every process must call this.

    Args:
        trainer: constructed like the one that was saved.
        checkpoint: as returned by `load_checkpoint`.
        differences: see `load_training`.

    Raises:
        ValueError: if the checkpoint belongs to another run, naming each difference; the trainer is then unchanged.
    """
    check_can_be_saved(trainer)
    run_together(trainer.accelerator, lambda: _check_same_run(trainer, checkpoint, differences), ValueError)
    state, model = checkpoint.state, trainer.accelerator.unwrap_model(trainer.model)
    stored, _ = _split(model)
    with checkpoint.open(POLICY) as file, torch.no_grad():
        for name, tensor in stored.items():
            tensor.copy_(file.get_tensor(name))
    for name, module in model.named_modules():
        module.training = state["modes"]["training"] != (name in state["modes"]["other"])
    with checkpoint.open(OPTIMIZER) as file:
        remarks = load_optimizer(
            state["optimizer"],
            inner(trainer.optimizer),
            dict(model.named_parameters()),
            file.get_tensor,
            scheduled=trainer.lr_scheduler is not None,
        )
        if trainer.lr_scheduler is not None:
            trainer.lr_scheduler.load_state_dict(decode(state["scheduler"], file.get_tensor))
        if trainer.accelerator.scaler is not None and state["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(decode(state["scaler"], file.get_tensor))
        trainer_state = decode(state["ppo"], file.get_tensor)
    remarks = [*_harmless_differences(trainer, checkpoint), *remarks]
    kl_coef = trainer.kl_ctl.value
    trainer.load_state_dict(trainer_state | {"minibatch_order": trainer._trl_generator.get_state()})
    if _new_fixed_coefficient(trainer, state):
        trainer.kl_ctl.value = kl_coef
    rank = trainer.accelerator.process_index
    set_generators(state["generators"][rank], trainer.accelerator.device, trainer._trl_generator)
    for remark in remarks:
        logger.warning("resuming %s: %s", checkpoint.path.name, remark)


def _check_same_run(trainer: RunState, checkpoint: Checkpoint, more: Callable[[Checkpoint], Sequence[str]]) -> None:
    differences = [*_differences(trainer, checkpoint), *more(checkpoint)]
    if differences:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of another run: {'; '.join(differences)}. To go on with that run, "
            "start as it was started; for a new run, choose another folder"
        )


def _differences(trainer: RunState, checkpoint: Checkpoint) -> Iterator[str]:
    """Yields reasons why this trainer cannot resume from a checkpoint."""
    state, now = checkpoint.state, _identity(trainer)
    for name in ("processes", "tokenizer_size", "scheduler_class"):
        if state[name] != now[name]:
            yield f"{name} was {state[name]}, is {now[name]}"
    before = _algorithm(state)
    if before["name"] != now["algorithm"]["name"]:
        yield f"the algorithm was {before['name']}, is {now['algorithm']['name']}"
    for name in _FIXED_SETTINGS:
        if state["config"][name] != now["config"][name]:
            yield f"{name} was {state['config'][name]}, is {now['config'][name]}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    stored, frozen = _split(model)
    with checkpoint.open(POLICY) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
        saved = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    yield from _compare("the policy", saved, {name: kind_of(tensor) for name, tensor in stored.items()})
    fingerprints = trainer._trl_fingerprints.of("policy", frozen)
    yield from _compare("the base model", state["frozen"], fingerprints, values="other weights")
    reference = _reference(trainer)
    if (reference is None) != (state["reference"] is None):
        kinds = {True: "no model beside the policy", False: "a separate model"}
        yield f"the reference was {kinds[state['reference'] is None]}, is {kinds[reference is None]}"
    else:
        yield from _compare("the reference model", state["reference"] or {}, reference or {}, values="other weights")
    yield from optimizer_differences(state["optimizer"], inner(trainer.optimizer), dict(model.named_parameters()))


def _compare(owner: str, saved: Mapping[str, Any], now: Mapping[str, Any], values: str = "") -> Iterator[str]:
    """Describes missing, new and changed entries, naming up to three of each."""
    yield from _list_names(f"{owner} lacks", sorted(set(saved) - set(now)))
    yield from _list_names(f"{owner} has additional", sorted(set(now) - set(saved)))
    changed = [name for name in saved if name in now and saved[name] != now[name]]
    detail = values or (f"was {_describe(saved[changed[0]])}, is {_describe(now[changed[0]])}" if changed else "")
    yield from _list_names(f"{owner} has {values} in" if values else f"{owner} ({detail}) differs in", changed)


def _list_names(problem: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{problem} {', '.join(islice(names, 3))}{more}"


def _describe(kind_and_shape: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind_and_shape[0]} {list(kind_and_shape[1])}"


def _harmless_differences(trainer: RunState, checkpoint: Checkpoint) -> list[str]:
    """Remarks on differences that do not prevent resuming: changed settings, and hardware or library versions.

    Call it after loading the optimizer, whose learning rate is the one in effect.
    """
    state, now, remarks = checkpoint.state, _identity(trainer), []
    changed = {
        name: (state["config"][name], value)
        for name, value in now["config"].items()
        if name in state["config"] and state["config"][name] != value  # the checkpoint lacks newer settings
    }
    choices = {**_algorithm(state), **now["algorithm"]}
    changed |= {
        f"algorithm.{name}": (_algorithm(state).get(name), now["algorithm"].get(name))
        for name in choices
        if _algorithm(state).get(name) != now["algorithm"].get(name)
    }
    rate = float(trainer.optimizer.param_groups[0]["lr"])
    if "learning_rate" in changed and rate != trainer.config.learning_rate:
        old, new = changed.pop("learning_rate")
        remarks.append(f"learning_rate was {old}, is {new}, which has no effect: the optimizer continues at {rate:g}")
    if changed:
        changes = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        remarks.append(f"settings have changed; the new values are used: {changes}")
    if "seed" in changed:
        remarks.append("the new seed has no effect: the random generators continue from their saved states")
    before = {"device": state["device"], "mixed_precision": state["mixed_precision"], **checkpoint.versions}
    here = {"device": now["device"], "mixed_precision": now["mixed_precision"], **versions()}
    moved = [f"{name} was {old}, is {here.get(name)}" for name, old in before.items() if old != here.get(name)]
    if moved:
        remarks.append(f"results may differ in rounding from an uninterrupted run: {', '.join(moved)}")
    return remarks


def _new_fixed_coefficient(trainer: RunState, state: Mapping[str, Any]) -> bool:
    """Whether the KL coefficient is fixed and the user changed it, so that the new value overrides the saved one."""
    config, saved = trainer.config, state["config"]
    return not config.adap_kl_ctrl and decode(saved["init_kl_coef"], no_tensors) != config.init_kl_coef
