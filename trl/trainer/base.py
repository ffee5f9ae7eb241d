"""What every trainer of this library can do with its model: save it, describe it, upload it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

_CARD = """---
library_name: trl
tags:
- trl
- ppo
- reinforcement-learning
---

# {model_name}

A language model with a value head, fine-tuned with reinforcement learning by [trl](https://pypi.org/project/trl)
{version}.

## Use

As a language model, the critic left aside:

```python
from transformers import AutoTokenizer, {plain_class}

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = {plain_class}.from_pretrained("{model_id}")
```

With the value head, to train on:

```python
from trl import {wrapper_class}

model = {wrapper_class}.from_pretrained("{model_id}")
```
"""


class BaseTrainer:
    """A trainer with a `model`, a `tokenizer` and an `accelerator`."""

    config: Any
    model: Any
    tokenizer: Any
    accelerator: Any

    def __init__(self, config: Any) -> None:
        self.config = config

    def step(self, *args: Any) -> Any:
        """One step of optimisation."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def loss(self, *args: Any) -> Any:
        """What a step makes smaller."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def compute_rewards(self, *args: Any) -> Any:
        """Rewards of single tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no compute_rewards")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes model, value head, tokenizer and model card to a folder, on the main process.

        Args:
            save_directory: is made if missing.
            **kwargs: for the model's `save_pretrained`, such as `max_shard_size`.
        """
        if not self.accelerator.is_main_process:
            return
        path = Path(save_directory)
        path.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(path, **kwargs)
        self.tokenizer.save_pretrained(path)
        self.create_model_card(str(path))

    def create_model_card(self, path: str, model_name: str | None = "TRL Model") -> None:
        """Writes `README.md` into the folder `path`.

        Args:
            path: an existing folder.
            model_name: the card's title.
        """
        from trl import __version__

        wrapper = self.accelerator.unwrap_model(self.model)
        card = _CARD.format(
            model_name=model_name,
            version=__version__,
            plain_class=wrapper.transformers_parent_class.__name__,
            wrapper_class=type(wrapper).__name__,
            model_id=Path(path).name,
        )
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any) -> Any:
        """Saves to a temporary folder and uploads that to the Hugging Face hub.

        Args:
            repo_id: `user/name`; made if missing.
            private: whether a new repository is private.
            token: the hub's token; that of the machine's login if None.
            **kwargs: for `huggingface_hub.HfApi.upload_folder`, such as `commit_message`.

        Returns:
            What the upload returned; None on other processes than the main one.
        """
        if not self.accelerator.is_main_process:
            return None
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.create_model_card(folder, model_name=repo_id)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)
