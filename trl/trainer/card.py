"""Model cards: base model, training settings and example code for loading."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl.models import PreTrainedModelWrapper
from trl.pretrained import find_file
from trl.redaction import redact
from trl.trackers.plain import plain

HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
# Settings left out of the card: they describe the run rather than the algorithm, or may contain paths.
_HIDDEN_SETTINGS = (
    "task_name", "model_name", "log_with", "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "tracker_project_name",
    "push_to_hub_if_best_kwargs", "compare_steps", "exp_name", "query_dataset", "reward_model", "dataset_num_proc",
    "optimize_device_cache", "backward_batch_size", "world_size", "global_batch_size", "global_backward_batch_size",
    "is_encoder_decoder", "is_peft_model",
)  # fmt: skip
# This project has no public address to link to, and the package index has another `trl`.
_WHICH_TRL = "a from-scratch implementation of RLHF for language models, not the `trl` of the Python Package Index"
_INHERITED = ("license", "license_name", "license_link")
_CARD = """---
{metadata}---

# {title}

{what}, fine-tuned with reinforcement learning{base}.

## Use

As a language model{without_head}{needs}:

```python
from transformers import AutoTokenizer, {plain_class}

source = {source}
tokenizer = AutoTokenizer.from_pretrained(source)
model = {plain_class}.from_pretrained(source)
```

{head_use}## Training

{method}: {steps} steps of {samples} samples.{data}

| setting | value |
| --- | --- |
{settings}

All other settings are the defaults. Versions: {versions}.
{results}"""
_RESULTS = """
## Results

| metric | value |
| --- | --- |
{rows}
"""
_HEAD_USE = """With the value head, to continue training:

```python
from trl import {wrapper_class}

model = {wrapper_class}.from_pretrained(source)
```

"""
_PPO = """PPO ([arXiv:1707.06347](https://arxiv.org/abs/1707.06347)) on scores of whole responses, with a penalty on the KL divergence from
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
    import yaml

    from trl import __version__

    with_head = algorithm["name"] == "ppo"  # others train no critic, and save none
    metadata = _metadata(model, algorithm["name"])
    if data is not None and "/" in data and HUB_ID.fullmatch(data):
        metadata["datasets"] = [data]
    base_model = metadata.get("base_model")
    base_links = ", ".join(
        f"[{name}](https://huggingface.co/{name})"
        for name in ([base_model] if isinstance(base_model, str) else base_model or [])
    )
    library_versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    text = _CARD.format(
        metadata=yaml.safe_dump(redact(metadata), sort_keys=False),
        title=title,
        what=("A LoRA or other PEFT adapter of a language model" if model.is_peft_model else "A language model")
        + (("," if model.is_peft_model else "") + " with a value head" if with_head else ""),
        base=f" from {base_links}" if base_links else "",
        needs=" (an adapter needs `pip install peft`)" if model.is_peft_model else "",
        plain_class=model.transformers_parent_class.__name__,
        head_use=_HEAD_USE.format(wrapper_class=type(model).__name__) if with_head else "",
        without_head=", without the value head" if with_head else "",
        method=_PPO if with_head else _OTHER.format(name=algorithm["name"]),
        source=f'"{repo_id}"' if repo_id else '"."  # the folder of this file',
        steps=steps,
        samples=samples,
        data=f" Data: {data.rstrip('.')}." if data else "",
        results=_RESULTS.format(rows="\n".join(f"| `{name}` | {value:.4g} |" for name, value in metrics.items()))
        if metrics
        else "",
        settings="\n".join(
            f"| `{name}` | `{value}` |"
            for name, value in ({k: v for k, v in algorithm.items() if k != "name"} | _settings(config)).items()
        ),
        versions=", ".join([f"trl {__version__} ({_WHICH_TRL})", *library_versions]),
    )
    return str(redact(text))


def base_model_of(model: PreTrainedModelWrapper) -> str:
    """Folder or hub id that the wrapped language model was loaded from; "" if unknown."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def _metadata(model: PreTrainedModelWrapper, algorithm: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "peft" if model.is_peft_model else "transformers"}
    source = base_model_of(model)
    inherited = _front_matter(source)
    # A local path means nothing to others, so use the base model that the folder's own card names.
    base_model = source if HUB_ID.fullmatch(source) and not Path(source).exists() else inherited.get("base_model")
    names = [base_model] if isinstance(base_model, str) else base_model if isinstance(base_model, list) else []
    if names and all(isinstance(name, str) and HUB_ID.fullmatch(name) for name in names):
        metadata["base_model"] = base_model
        metadata["base_model_relation"] = "adapter" if model.is_peft_model else "finetune"
    metadata |= {name: inherited[name] for name in _INHERITED if isinstance(inherited.get(name), str)}
    if not model.is_encoder_decoder:
        metadata["pipeline_tag"] = "text-generation"
    return metadata | {"tags": [algorithm, "reinforcement-learning"]}


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
