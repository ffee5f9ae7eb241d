"""Model cards of the offline stages: what a model was trained on, with which settings, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer, TrainerState, TrainingArguments

from trl.models.adapters import is_peft_model
from trl.models.trunk import base_language_model, is_encoder_decoder
from trl.trackers.plain import as_number, plain
from trl.trainer.card import (
    HUB_ID,
    base_links,
    base_model_of,
    fetch_base_card,
    hub_metadata,
    kind_of_model,
    loading_code,
    needs_peft,
    render,
)
from trl.trainer.offline.stage_config import StageConfig

# Settings of TrainingArguments that belong on a card; the others concern the machine, logs and files.
_OPTIMISATION = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "train_sampling_strategy", "fp16",
    "bf16", "gradient_checkpointing", "seed", "data_seed",
)  # fmt: skip
_HIDDEN = ("model_init_kwargs", "trust_remote_code", "dataset_num_proc", "chat_template_path")
_NO_RESULTS = ("learning_rate", "grad_norm", "epoch", "step", "num_tokens")
_TIMES = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
# Kind of model by the end of its class's name: words, auto class, the Hub's name of the task.
_CLASSIFIERS = {
    "ForSequenceClassification": ("reward model", "AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("process reward model", "AutoModelForTokenClassification", "token-classification"),
}
_REWARD = """
As a reward of PPO or best-of-n:

```python
from trl.rewards import {name}

reward = {name}.from_pretrained(source{options})
```
"""


@dataclass(frozen=True, slots=True)
class StageKind:
    """What a card says about a stage."""

    tag: str
    """Tag on the Hub."""
    summary: str
    """Words on the training, for the card's first sentence."""
    method: str
    """Markdown: what is minimised."""
    reward: str | None = None
    """The class of `trl.rewards` that scores with the model."""


class CardTrainer(Trainer):
    """`transformers.Trainer` whose saved models come with a card."""

    stage_kind: ClassVar[StageKind]
    # Name of the training data, where it has one: a stage sets it to `source_name` of what it was given.
    _trl_source: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and tokenizer, and, unless it is a checkpoint's, a model card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir)
            write_card(folder, self._trl_card(folder.name, None))

    def create_model_card(  # the arguments of TRL 1
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        *,
        language: str | None = None,
        license: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a model card to `README.md` in `args.output_dir`, on the main process; `push_to_hub` calls this.

        Args:
            model_name: title of the card.
            dataset_name: hub id of the training data.
            tags: tags besides the stage's own.
            language: for the metadata.
            license: for the metadata; None takes that of the model that training began with.
            data: what the training data are, in words; None names their file or hub id.
            metrics: results by name, besides those of the last evaluation or log row.
        """
        if not self.is_world_process_zero():
            return
        if self.hub_model_id is not None:
            fetch_base_card(base_model_of(base_language_model(self.model)), self.args.hub_token)
        card = self._trl_card(
            model_name or Path(self.args.output_dir).name,
            self.hub_model_id,
            dataset_name=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            more={name: value for name, value in (("language", language), ("license", license)) if value is not None},
            data=data,
            metrics=metrics,
        )
        write_card(Path(self.args.output_dir), card)

    def _trl_card(self, title: str, repo_id: str | None, **about: Any) -> str:
        return stage_card(
            self.accelerator.unwrap_model(self.model),
            self.args,
            self.state,
            self.stage_kind,
            title=title,
            repo_id=repo_id,
            rows=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            source=self._trl_source,
            **about,
        )


def stage_card(
    model: Any,
    args: StageConfig,
    state: TrainerState,
    stage: StageKind,
    *,
    title: str,
    repo_id: str | None,
    rows: int | None,
    source: str | None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Renders the card of a stage's model in Markdown.

    Args:
        model: transformers or PEFT model, unwrapped.
        args: the stage's settings.
        state: steps, epochs and log rows.
        stage: the stage.
        title: title of the card.
        repo_id: hub id that the example code loads; None to load the card's own folder.
        rows: number of rows of the training data; None if unknown.
        source: name of the training data; None if it has none.
        dataset_name: hub id of the training data; None takes `source` if it is one.
        tags: tags besides the stage's own.
        more: further metadata.
        data: what the training data are, in words; None makes them of `rows` and `source`.
        metrics: results besides those in `state`.
    """
    base, is_adapter = base_language_model(model), is_peft_model(model)
    end = next((end for end in _CLASSIFIERS if type(base).__name__.endswith(end)), None)
    if end is not None:
        kind, plain_class, task = _CLASSIFIERS[end]
    elif is_encoder_decoder(model):
        kind, plain_class, task = "language model", "AutoModelForSeq2SeqLM", None
    else:
        kind, plain_class, task = "language model", "AutoModelForCausalLM", "text-generation"
    named = dataset_name or source
    metadata = hub_metadata(
        base_model_of(base), is_peft_model=is_adapter, tags=[stage.tag, *tags], task=task, dataset=named
    )
    # The base of a classifier's adapter is loaded with as many outputs as the adapter has.
    options = f", num_labels={base.config.num_labels}" if end is not None and is_adapter else ""
    use = f"With transformers{needs_peft(is_adapter)}:\n\n{loading_code(plain_class, repo_id, options)}"
    if stage.reward is not None:
        label = ", label=0" if stage.reward == "ClassifierReward" else ""
        use += _REWARD.format(name=stage.reward, options=label + options)
    if data is None:
        count = "rows" if rows is None else f"{rows:,} rows"
        data = f"{count} of `{named}`" if named else count
    return render(
        title=title,
        metadata=metadata | dict(more or {}),
        what=kind_of_model(kind, is_adapter) + f", {stage.summary}{base_links(metadata)}",
        use=use,
        training=f"{stage.method}: {_amount(args, state)}. Data: {data.rstrip('.')}.",
        settings=_settings(args),
        metrics=_results(state.log_history) | dict(metrics or {}),
    )


def source_name(dataset: Any) -> str | None:
    """Returns the hub id of a data set, or the name of its file without the folder; None if it is no path and no id."""
    if not isinstance(dataset, str | Path):
        return None
    text = str(dataset)
    return text if isinstance(dataset, str) and HUB_ID.fullmatch(text) and not Path(text).exists() else Path(text).name


def write_card(folder: Path, card: str) -> None:
    """Writes a card to `README.md` in a folder, in place of the one that peft makes of its template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _amount(args: StageConfig, state: TrainerState) -> str:
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = "" if state.epoch is None else f" (epoch {state.epoch:.3g})"
    return f"{state.global_step:,} steps of {rows:,} rows{epochs}"


def _settings(args: StageConfig) -> dict[str, Any]:
    """The learning rate, and the stage's and the optimisation's settings that differ from their defaults."""
    elsewhere = {entry.name for entry in fields(TrainingArguments)}.difference(_OPTIMISATION).union(_HIDDEN)
    changed: dict[str, Any] = {}
    for entry in fields(args):
        if entry.name in elsewhere:
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = getattr(args, entry.name)
        if entry.name == "learning_rate" or value != default:
            changed[entry.name] = value
    return dict(plain(changed))


def _results(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last evaluation's metrics, and under `train/` those of the last row of the training."""
    training: Mapping[str, Any] = next((row for row in reversed(log) if "loss" in row), {})
    results = {f"train/{name}": value for name, value in training.items() if name not in _NO_RESULTS}
    evaluations = [row for row in log if any(name.startswith("eval_") for name in row)]
    for row in evaluations:  # several data sets have a row each
        if row.get("step") == evaluations[-1].get("step"):
            results |= {k: value for k, value in row.items() if k not in _NO_RESULTS and not k.endswith(_TIMES)}
    numbers = {name: as_number(value) for name, value in results.items()}
    return {name: float(number) for name, number in numbers.items() if number is not None}
