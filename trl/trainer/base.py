"""`BaseTrainer`: saving the model, writing its card and uploading it to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.models.saving import make_repository, upload_folder
from trl.trainer.card import HUB_ID, base_model_of, fetch_base_card, model_card
from trl.trainer.hooks import old_attribute


class BaseTrainer:
    """Base class of trainers with a `model`, a `tokenizer` and an `accelerator`."""

    config: Any
    model: Any
    tokenizer: Any
    accelerator: Any
    _trl_steps_done = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    if not TYPE_CHECKING:  # type checkers still report unknown attributes

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property raised the AttributeError itself
                return object.__getattribute__(self, name)
            return old_attribute(self, name)

    @property
    def _trl_choices(self) -> dict[str, str]:
        """Name and choices of the algorithm, in words; PPO's are settings of `config`."""
        return {"name": "ppo"}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one optimisation step."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def loss(self, *args: Any) -> Any:
        """Computes the loss that a step minimises."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def compute_rewards(self, *args: Any) -> Any:
        """Computes per-token rewards."""
        raise NotImplementedError(f"{type(self).__name__} has no compute_rewards")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves model (with its value head, if trained), tokenizer and model card to a folder, on the main process.

        Args:
            save_directory: target folder; created if missing.
            **kwargs: arguments of the model's `save_pretrained`, such as `max_shard_size`.
        """
        if not self.accelerator.is_main_process:
            return
        path = Path(save_directory)
        path.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(path, **kwargs)

    def _save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves to an existing folder, for `save_pretrained` on the main process; a hook."""
        self._trl_saved_model().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(str(save_directory))

    def _trl_saved_model(self) -> Any:
        """The model that `save_pretrained` saves."""
        return self.accelerator.unwrap_model(self.model)

    def create_model_card(
        self,
        path: str,
        model_name: str | None = "TRL Model",
        *,
        data: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a model card to `README.md` in the folder `path`.

        The card names the base model and the training settings, states data and results where they are given, and shows
        how to load the model. Needs no network.

        Args:
            path: existing folder.
            model_name: title of the card. If it is a hub id (`user/name`), the card's example code loads that id;
                otherwise it loads the folder.
            data: what the prompts and the reward were, in words; or the Hub id of the dataset.
            metrics: results by name, such as those of a held-out evaluation.
        """
        is_id = model_name is not None and "/" in model_name and HUB_ID.fullmatch(model_name)
        card = model_card(
            self.accelerator.unwrap_model(self.model),
            self.config,
            title=model_name,
            repo_id=model_name if is_id else None,
            steps=self._trl_steps_done,
            samples=int(self.config.batch_size) * self.accelerator.num_processes,
            algorithm=self._trl_choices,
            data=data,
            metrics=metrics,
        )
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model to a temporary folder and uploads it to the Hugging Face Hub, on the main process.

        Args:
            repo_id: `user/name`, or `name` in the namespace of the token's user; created if missing.
            private: whether a newly created repository is private.
            token: Hub token; None uses the machine's login.
            data: for the model card, see `create_model_card`.
            metrics: likewise.
            **kwargs: arguments of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`.

        Returns:
            The result of the upload; None on processes other than the main one.
        """
        if not self.accelerator.is_main_process:
            return None
        repo_id = make_repository(repo_id, private=private, token=token)
        fetch_base_card(base_model_of(self.accelerator.unwrap_model(self.model)), token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            about: dict[str, Any] = {"data": data, "metrics": metrics}  # a subclass may not know them
            about = {name: value for name, value in about.items() if value is not None}
            self.create_model_card(folder, model_name=repo_id, **about)
            return upload_folder(folder, repo_id=repo_id, token=token, **kwargs)
