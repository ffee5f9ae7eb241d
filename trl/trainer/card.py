"""Model cards: base model, training settings and example code for loading."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl.models import PreTrainedModelWrapper
from trl.pretrained import find_file
from trl.redaction import redact
from trl.trackers.plain import plain

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
# Settings left out of the card: they describe the run rather than the algorithm, or may contain paths.
_HIDDEN_SETTINGS = (
    "task_name", "model_name", "log_with", "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
    "tracker_project_name", "push_to_hub_if_best_kwargs", "compare_steps", "exp_name", "query_dataset", "reward_model",
    "dataset_num_proc", "optimize_device_cache", "backward_batch_size", "world_size", "global_batch_size",
    "global_backward_batch_size", "is_encoder_decoder", "is_peft_model",
)  # fmt: skip
# This project has no public address to link to, and the package index has another `trl`.
_WHICH_TRL = "a from-scratch implementation of RLHF for language models, not the `trl` of the Python Package Index"
_INHERITED = ("license", "license_name", "license_link")
_CARD = """---
{metadata}---

# {title}

{what}.

## Use

{use}
## Training

{training}

| setting | value |
| --- | --- |
{settings}

All other settings are the defaults. Versions: {versions}.
{results}"""
_LOADING = """```python
from transformers import AutoTokenizer, {plain_class}

source = {source}
tokenizer = AutoTokenizer.from_pretrained(source)
model = {plain_class}.from_pretrained(source{options})
```
"""
_RESULTS = """
## Results

| metric | value |
| --- | --- |
{rows}
"""
_HEAD_USE = """
With the value head, to continue training:

```python
from trl import {wrapper_class}

model = {wrapper_class}.from_pretrained(source)
```
"""
_PPO = """PPO ([arXiv:1707.06347](https://arxiv.org/abs/1707.06347)) on scores of whole responses, with a penalty on \
the KL divergence from
the initial model ([arXiv:1909.08593](https://arxiv.org/abs/1909.08593))"""
_OTHER = "{name}, a policy gradient without a critic, on scores of whole responses"


def model_card(
    model: PreTrainedModelWrapper,
    config: Any,
    *,
    title: str | None,
    repo_id: str | None,
    steps: int,
    samples: int,
    algorithm: Mapping[str, str],
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Renders a model card in Markdown with the Hub's metadata header, secrets redacted.

    Args:
        model: the saved model, unwrapped.
        config: the trainer's settings, a dataclass.
        title: title of the card.
        repo_id: hub id that the example code loads; None to load the card's own folder.
        steps: calls to `step` so far.
        samples: samples per step, over all processes.
        algorithm: its name and choices in words; PPO's are settings.
        data: what the prompts and the reward were, in words or Markdown; a Hub dataset id also goes to the metadata.
        metrics: results by name.
    """
    with_head = algorithm["name"] == "ppo"  # others train no critic, and save none
    task = None if model.is_encoder_decoder else "text-generation"
    metadata = hub_metadata(
        base_model_of(model),
        is_peft_model=model.is_peft_model,
        tags=[algorithm["name"], "reinforcement-learning"],
        task=task,
        dataset=data,
    )
    plain_class = model.transformers_parent_class.__name__
    intro = f"As a language model{', without the value head' if with_head else ''}{needs_peft(model.is_peft_model)}:"
    method = _PPO if with_head else _OTHER.format(name=algorithm["name"])
    about_data = f" Data: {data.rstrip('.')}." if data else ""
    return render(
        title=title,
        metadata=metadata,
        what=kind_of_model("language model", model.is_peft_model)
        + ((", with" if model.is_peft_model else " with") + " a value head" if with_head else "")
        + ", fine-tuned with reinforcement learning"
        + base_links(metadata),
        use=f"{intro}\n\n{loading_code(plain_class, repo_id)}"
        + (_HEAD_USE.format(wrapper_class=type(model).__name__) if with_head else ""),
        training=f"{method}: {steps} steps of {samples} samples.{about_data}",
        settings={name: value for name, value in algorithm.items() if name != "name"} | _settings(config),
        metrics=metrics,
    )


def render(
    *,
    title: str | None,
    metadata: Mapping[str, Any],
    what: str,
    use: str,
    training: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
) -> str:
    """Renders a model card from its parts, secrets redacted.

    Args:
        title: title of the card.
        metadata: of the Hub, from `hub_metadata`.
        what: what kind of model it is, without the full stop.
        use: Markdown that says how to load the model; ends with a newline.
        training: Markdown that says how it was trained, on what.
        settings: settings that differ from their defaults.
        metrics: results by name; None or {} for no such section.
    """
    import yaml

    from trl import __version__

    library_versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    rows = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in (metrics or {}).items())
    text = _CARD.format(
        metadata=yaml.safe_dump(redact(dict(metadata)), sort_keys=False),
        title=title,
        what=what,
        use=use,
        training=training,
        settings="\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items()),
        versions=", ".join([f"trl {__version__} ({_WHICH_TRL})", *library_versions]),
        results=_RESULTS.format(rows=rows) if rows else "",
    )
    return str(redact(text))


def loading_code(plain_class: str, repo_id: str | None, options: str = "") -> str:
    """Markdown of the code that loads tokenizer and model.

    Args:
        plain_class: name of transformers' auto class.
        repo_id: hub id; None for the card's own folder.
        options: further arguments of `from_pretrained`, as code that begins with a comma.
    """
    source = f'"{repo_id}"' if repo_id else '"."  # the folder of this file'
    return _LOADING.format(plain_class=plain_class, source=source, options=options)


def kind_of_model(kind: str, is_peft_model: bool) -> str:
    """The first words of a card: "A language model", or "A LoRA or other PEFT adapter of a language model"."""
    return f"A LoRA or other PEFT adapter of a {kind}" if is_peft_model else f"A {kind}"


def needs_peft(is_peft_model: bool) -> str:
    """A remark for the sentence before the code that loads the model."""
    return " (an adapter needs `pip install peft`)" if is_peft_model else ""


def base_links(metadata: Mapping[str, Any]) -> str:
    """The words " from" and links to the base models; "" if they are unknown."""
    base_model = metadata.get("base_model")
    names = [base_model] if isinstance(base_model, str) else base_model or []
    links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in names)
    return f" from {links}" if links else ""


def base_model_of(model: Any) -> str:
    """Folder or hub id that a language model was loaded from; "" if unknown."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def hub_metadata(
    source: str, *, is_peft_model: bool, tags: Sequence[str], task: str | None, dataset: str | None = None
) -> dict[str, Any]:
    """Metadata of a card for the Hub, with licence and base model from the card of the model it was trained from.

    Args:
        source: folder or hub id of that model.
        is_peft_model: the card is an adapter's.
        tags: tags of the card.
        task: the Hub's name of what the model does; None if it has none.
        dataset: left out unless it is a hub id with a namespace.
    """
    metadata: dict[str, Any] = {"library_name": "peft" if is_peft_model else "transformers"}
    inherited = _front_matter(source)
    # A local path means nothing to others, so use the base model that the folder's own card names.
    base_model = source if HUB_ID.fullmatch(source) and not Path(source).exists() else inherited.get("base_model")
    names = [base_model] if isinstance(base_model, str) else base_model if isinstance(base_model, list) else []
    if names and all(isinstance(name, str) and HUB_ID.fullmatch(name) for name in names):
        metadata["base_model"] = base_model
        metadata["base_model_relation"] = "adapter" if is_peft_model else "finetune"
    metadata |= {name: inherited[name] for name in _INHERITED if isinstance(inherited.get(name), str)}
    if task is not None:
        metadata["pipeline_tag"] = task
    metadata["tags"] = list(tags)
    if dataset is not None and "/" in dataset and HUB_ID.fullmatch(dataset):
        metadata["datasets"] = [dataset]
    return metadata


def fetch_base_card(source: str, token: str | None) -> None:
    """Tries to download the card of a base model, which names the licence, into the local cache."""
    if HUB_ID.fullmatch(source):
        try:
            find_file(source, "README.md", {} if token is None else {"token": token})
        except (OSError, ValueError) as error:
            logger.info("the model card of %s could not be read; the new card names no licence: %s", source, error)


def _front_matter(source: str) -> dict[str, Any]:
    """Metadata of the model card in a folder, or in the download cache for a hub id; {} if there is no card."""
    import yaml

    try:
        path = find_file(source, "README.md", {"local_files_only": True}) if source else None
    except (OSError, ValueError):  # folder no longer exists, or invalid name
        path = None
    if path is None:
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", Path(path).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def _settings(config: Any) -> dict[str, Any]:
    """The learning rate and all settings that differ from their defaults."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _HIDDEN_SETTINGS}
    defaults = {f.name: _default(f) for f in fields(config)}
    return plain(
        {name: value for name, value in settings.items() if name == "learning_rate" or value != defaults[name]}
    )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
