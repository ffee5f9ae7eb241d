"""The offline stages on the command line: trainer and rows from settings, an estimate, and what the model is for."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from trl.cli.catalogue import STAGES
from trl.cli.places import place_of
from trl.cli.problems import UsageError
from trl.cli.resolve import DEFAULT, Resolved

if TYPE_CHECKING:
    from trl.data.formats import Kind

_KINDS: dict[str, Kind] = {
    "sft": "language_modeling",
    "reward": "preference",
    "dpo": "preference",
    "kto": "unpaired_preference",
}
_HELD_OUT = "held-out rows"  # source of what follows from them


def with_evaluation(resolved: Resolved) -> Resolved:
    """The settings, with an evaluation per epoch where there are rows for it and nothing is said about when."""
    path = f"{STAGES[resolved.command]}.eval_strategy"
    if not (resolved["data.held_out"] or resolved["data.eval_dataset"]) or resolved.sources[path] != DEFAULT:
        return resolved
    return resolved.with_value(path, "epoch", _HELD_OUT)


def prepare(command: str, resolved: Resolved, folder: str | None) -> tuple[Any, dict[str, Any]]:
    """The trainer of a stage, and the arguments of its run.

    Args:
        command: "sft", "reward", "dpo" or "kto".
        resolved: settings.
        folder: as of the other commands; a stage imports no module of the user's.

    Raises:
        UsageError: if a setting does not fit the model, or a row is not sound.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from trl.cli import building
    from trl.trainer.offline.dpo_trainer import DPOTrainer
    from trl.trainer.offline.kto_trainer import KTOTrainer
    from trl.trainer.offline.reward_trainer import RewardTrainer
    from trl.trainer.offline.sft_trainer import SFTTrainer
    from trl.trainer.offline.stage import load_stage_model

    building.quiet()
    args, settings = _config(resolved), resolved.section("model")
    name = place_of(resolved["model.name"])
    seq2seq = bool(getattr(building.model_config(resolved), "is_encoder_decoder", False))
    arguments: dict[str, Any] = {"args": args, "processing_class": building.tokenizer(resolved)}
    if resolved["lora.r"] is not None:
        task = "SEQ_CLS" if command == "reward" else "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
        arguments["peft_config"] = building.lora_config(resolved, task)
    classes: dict[str, Any] = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer, "kto": KTOTrainer}
    try:
        train_rows, eval_rows = _rows(resolved, args)
        arguments |= {"train_dataset": train_rows, "eval_dataset": eval_rows}
        if command in ("dpo", "kto") and settings.reference is not None:
            parent = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
            arguments["ref_model"] = load_stage_model(place_of(settings.reference), parent, args)
        trainer = classes[command](name, **arguments)
    except (ValueError, OSError) as error:
        raise UsageError([resolved.problem(str(error))]) from error
    show = resolved["train.progress"]
    return trainer, {"run_dir": resolved["train.run_dir"], "progress": True if show is None else show}


def _config(resolved: Resolved) -> Any:
    """The stage's settings as its trainer takes them."""
    args, settings = resolved.section(STAGES[resolved.command]), resolved.section("model")
    args.disable_tqdm = True  # the run shows its own progress
    args.trust_remote_code = settings.trust_remote_code
    extra = {"revision": settings.revision, "allow_pickle": settings.allow_pickle or None}
    args.model_init_kwargs = args.init_kwargs | {key: value for key, value in extra.items() if value is not None}
    return args


def _rows(resolved: Resolved, args: Any) -> tuple[Any, Any]:
    """Rows to train on and to evaluate on, as the trainers take them."""
    from trl.cli.building import split_off
    from trl.data.formats import read

    source, held_out = resolved["data.dataset"], resolved["data.held_out"]
    if not held_out:
        return source, resolved["data.eval_dataset"]
    # Checked here, where the place of a row in its file is still known.
    rows = [row for _, row, _ in read(source, name="dataset", text_field=getattr(args, "dataset_text_field", "text"))]
    if held_out >= len(rows):
        raise UsageError([resolved.problem(f"held_out={held_out} leaves none of {len(rows)} rows", "data")])
    return split_off(rows, held_out)


def next_commands(stage: str, run: str) -> list[str]:
    """What to do with the model of a finished stage.

    Args:
        stage: the stage's name in the run's settings.
        run: run folder, as it is shown.
    """
    if stage == "reward":
        return [f"trl ppo CONFIG.yaml --reward classifier:{run}/model"]
    return [f"trl generate {run} --prompt TEXT", f"trl ppo CONFIG.yaml --model {run}/model"]


def estimate(resolved: Resolved) -> str:
    """The cost of a stage, from the model's configuration and the rows alone.

    Memory counts float32 weights, gradients and Adam's two moments. Activations are those of `trl.cli.estimate`,
    without logits, which no stage makes.

    Raises:
        UsageError: if a row is not sound.
    """
    from trl.cli import building
    from trl.cli.estimate import count, size

    args = _config(resolved)
    config = building.model_config(resolved)
    model = _without_weights(resolved, config)
    parameters, trained = count(model.parameters()), count(p for p in model.parameters() if p.requires_grad)
    try:
        lengths = _lengths(resolved, args, building.tokenizer(resolved))
    except (ValueError, OSError) as error:
        raise UsageError([resolved.problem(str(error))]) from error
    rows = len(lengths)
    if getattr(args, "packing", False):
        from trl.data.tokenized import pack

        lengths = [
            sum(piece.stop - piece.start for piece in row)
            for row in pack(lengths, args.max_length, args.packing_strategy)
        ]
    batch = args.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = math.ceil(math.ceil(len(lengths) / batch) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    width = int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 0)
    layers = int(getattr(config, "num_hidden_layers", None) or 0)
    mean = sum(lengths) / len(lengths)
    activations = int(args.per_device_train_batch_size * mean * layers * width) * (
        68 if args.gradient_checkpointing is False else 4
    )
    kept = resolved.command in ("dpo", "kto") and args.precompute_ref_log_probs is False and trained == parameters
    reference = 4 * parameters * int(kept)
    total = 4 * parameters + reference + 12 * trained + activations
    packed = f" in {len(lengths):,} packed rows" if len(lengths) != rows else ""
    return "\n".join(
        [
            f"parameters      {parameters:,}, of which {trained:,} are trained",
            f"memory          about {size(total)}: weights {size(4 * parameters)}, reference {size(reference)}, "
            f"gradients {size(4 * trained)}, optimizer {size(8 * trained)}, activations {size(activations)}",
            f"rows            {rows:,}{packed}, {mean:.0f} tokens on average",
            f"a step          {batch * args.gradient_accumulation_steps} rows, about "
            f"{batch * args.gradient_accumulation_steps * mean:,.0f} tokens",
            f"the run         {steps:,} steps, {steps / per_epoch:.1f} passes over the rows",
        ]
    )


def _lengths(resolved: Resolved, args: Any, tokenizer: Any) -> list[int]:
    """Tokens of each row; of a pair with its prompt twice."""
    from trl.data.formats import open_source, prepare
    from trl.data.row_encoder import RowEncoder

    train, _ = _rows(resolved, args)
    if resolved.command == "sft":
        limit = None if args.packing else args.max_length
        encoder = RowEncoder(
            tokenizer=tokenizer,
            text_field=args.dataset_text_field,
            completion_only=args.completion_only_loss,
            assistant_only=args.assistant_only_loss,
            max_length=limit,
        )
        return [len(row.ids) for row in encoder(open_source(train, "dataset"))]
    kind = _KINDS[resolved.command]
    data = prepare(train, kind, tokenizer, name="dataset", split_prompts=resolved.command == "dpo")
    columns = ("prompt", "prompt", "chosen", "rejected") if kind == "preference" else ("prompt", "completion")
    texts = ["".join(str(row.get(column) or "") for column in columns) for row in data.rows]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=not data.rendered).input_ids]


def _without_weights(resolved: Resolved, config: Any) -> Any:
    """The model as the trainer makes it, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    from trl.cli import building

    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    reward = resolved.command == "reward"
    if reward:
        config.num_labels = 1
    parent = (
        AutoModelForSequenceClassification if reward else AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = parent.from_config(config, trust_remote_code=resolved["model.trust_remote_code"])
        if resolved["lora.r"] is None:
            return model
        from trl.models.adapters import attach_adapter

        task = "SEQ_CLS" if reward else "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
        return attach_adapter(model, building.lora_config(resolved, task))
