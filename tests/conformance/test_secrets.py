"""Promise S9: secrets stay out of everything that a run writes, sends and says."""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
import torch
from accelerate.tracking import GeneralTracker

from tests.conformance.setting import make_batch, make_trainer
from tests.helpers import tiny_gpt2
from trl import NonFiniteError, PPOConfig, PPOTrainer
from trl.rewards import as_reward
from trl.trackers import read_completions

pytestmark = pytest.mark.conformance

# Of no form that a pattern could know: each is a secret by where it is alone.
HUB, TRACKER, URL, NESTED = "canary-hub-1", "canary:tracker/2", "canary-url-3", "canary-nested-4"
IN_ENVIRONMENT = {
    "HF_TOKEN": "canary-env-5",
    "OPENAI_API_KEY": "canary env\n6 'quoted'",
    "WANDB_API_KEY": "canary-env-7",
}
SECRETS = (HUB, TRACKER, URL, NESTED, *IN_ENVIRONMENT.values())


class Holder:
    """Something of a client's in the settings, with a secret in its repr."""

    def __repr__(self) -> str:
        return f"Holder({NESTED!r})"


def settings(folder: Path) -> dict[str, Any]:
    """A config with a secret in every place that takes one."""
    return {
        "push_to_hub_if_best_kwargs": {"repo_id": "me/best", "token": HUB},
        "tracker_kwargs": {
            "wandb": {"api_key": TRACKER, "base_url": f"https://me:{URL}@host/x", "client": Holder()},
            "swanlab": {"headers": [{"Authorization": f"Basic {NESTED}"}], "credentials": {"user": {"id": NESTED}}},
        },
        "project_kwargs": {"project_dir": str(folder), "logging_dir": str(folder / "tensorboard")},
        "task_name": f"with {IN_ENVIRONMENT['HF_TOKEN']} in its name",
        "model_name": f"https://{URL}@host/model",
    }


class Received(GeneralTracker):
    """A tracker of accelerate's that keeps what it was told."""

    name = "received"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append(values)


class Failing:
    """A tracker of ours whose client quotes its key when it fails."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self.told.append(dict(row))
        raise ConnectionError(f"401 for key {TRACKER!r} and {IN_ENVIRONMENT['WANDB_API_KEY']}")

    def close(self) -> None:
        pass


class Hub:
    """`HfApi` that keeps what is uploaded."""

    uploaded: ClassVar[list[bytes]] = []

    def __init__(self, token: str | None = None) -> None:
        assert token == HUB

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Url", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

    def upload_folder(self, *, folder_path: str, **kwargs: Any) -> None:
        self.uploaded.extend(path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file())


def leaks(data: bytes | str) -> list[str]:
    """The secrets that occur in `data`, plain or in the spelling of a URL or of a repr."""
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    return [s for s in SECRETS if any(form in text for form in (s, quote(s, safe=""), repr(s)[1:-1]))]


def leaks_of_folder(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    found = {str(path.relative_to(folder)): leaks(path.read_bytes()) for path in files}
    found |= {f"name of {path}": leaks(str(path.relative_to(folder))) for path in files}
    return {name: secrets for name, secrets in found.items() if secrets}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for name, value in IN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "uploaded", [])


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Fails with every secret in its message where it has the chance."""
    if "w9" in prompts[0]:
        raise RuntimeError(f"401 from https://me:{URL}@host with {HUB}, {TRACKER} and {list(IN_ENVIRONMENT.values())}")
    return [float(len(set(text))) for text in completions]


def finish(trainer: PPOTrainer) -> None:
    trainer.accelerator.end_training()


def test_s9_no_secret_in_a_whole_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    received, failing = Received(), Failing()
    run = tmp_path / "run"
    with caplog.at_level(logging.DEBUG, logger="trl"):
        trainer = make_trainer(
            batch_size=2, mini_batch_size=2, log_with=["tensorboard", received], **settings(tmp_path)
        )
        prompts: list[Any] = [f"w5 w6 {secret}" for secret in SECRETS]
        prompts += [{"prompt": "w9", "api_key": HUB, "note": f"by https://me:{URL}@host"}]
        trainer.train(
            prompts,
            reward=as_reward(reward, on_error="skip"),
            steps=4,
            run_dir=run,
            generation={"max_new_tokens": 4},
            trackers=[failing],
            save_every=2,
            progress=True,
        )
        stats = trainer.step(*(part[:2] for part in make_batch()))
        texts = {"query": [" ".join(SECRETS)] * 2, "response": [HUB, TRACKER]}
        trainer.log_stats(stats, texts, [torch.tensor(1.0)] * 2)
        finish(trainer)
    assert leaks_of_folder(tmp_path) == {}
    completions = [record for step in range(1, 5) for record in read_completions(run, step)]
    assert len(completions) == 8 and leaks(str(completions)) == []
    assert received.told and leaks(repr(received.told)) == []
    assert failing.told and leaks(repr(failing.told)) == []
    assert "tracker Failing failed" in caplog.text and leaks(caplog.text) == []
    assert leaks("".join(capfd.readouterr())) == []
    assert Hub.uploaded and leaks(b"".join(Hub.uploaded)) == []
    # They are settings, too: what is no secret is there.
    assert received.told[0]["push_to_hub_if_best_kwargs/repo_id"] == "me/best"
    events = list(tmp_path.rglob("events.out.tfevents*"))
    assert events and all(b"push_to_hub_if_best_kwargs/repo_id" in path.read_bytes() for path in events)


def test_s9_no_secret_in_what_a_failed_run_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dumps of updates that were not finite, and the error that ended the run."""

    class Poison:
        def on_start(self, trainer: PPOTrainer, step: int) -> None:
            with torch.no_grad():
                trainer.model.v_head.summary.weight.fill_(math.nan)

        def on_step(self, trainer: PPOTrainer, step: int, row: Any) -> None:
            pass

        on_save = on_end = on_step

    run = tmp_path / "nan"
    trainer = make_trainer(batch_size=2, mini_batch_size=2, **settings(tmp_path))
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(NonFiniteError):
        trainer.train(
            ["w5 w6", HUB], reward=lambda prompts, completions, **columns: [1.0] * len(prompts), steps=9, run_dir=run,
            callbacks=[Poison()], generation={"max_new_tokens": 4}, progress=False, max_skipped_updates=2,
        )  # fmt: skip
    assert list(run.glob("dumps/*.safetensors"))
    trainer = make_trainer(batch_size=2, mini_batch_size=2, **settings(tmp_path))
    with pytest.raises(RuntimeError, match="401"):
        trainer.train(
            ["w9", "w9 w9"], reward=reward, steps=1, run_dir=tmp_path / "failed", progress=False,
            generation={"max_new_tokens": 4},
        )  # fmt: skip
    assert "401" in (tmp_path / "failed" / "events.log").read_text()
    assert leaks_of_folder(tmp_path) == {}
    assert leaks(caplog.text) == []


def test_s9_the_repr_of_the_settings_has_no_secret(tmp_path: Path) -> None:
    config = PPOConfig(**settings(tmp_path))
    assert leaks(repr(config)) == [] and leaks(str(config)) == []
    assert "repo_id='me/best'" in repr(config).replace("'repo_id': ", "repo_id=")
    # The settings themselves are whole: whatever connects with them needs the secret.
    assert config.push_to_hub_if_best_kwargs["token"] == HUB
    assert dataclasses.replace(config).push_to_hub_if_best_kwargs["token"] == HUB


def test_s9_no_secret_of_a_git_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "code"
    repository.mkdir()
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://me:{URL}@host/code.git"],
        ["-c", "user.name=me", "-c", "user.email=me@host", "commit", "-q", "--allow-empty", "-m", "start"],
    ):
        subprocess.run(["git", *command], cwd=repository, check=True)
    monkeypatch.chdir(repository)
    make_trainer(batch_size=2, mini_batch_size=2).train(
        ["w5", "w6"], reward=reward, steps=1, run_dir=tmp_path / "run", generation={"max_new_tokens": 4}, progress=False
    )
    assert '"commit"' in (tmp_path / "run" / "environment.json").read_text()
    assert leaks_of_folder(tmp_path / "run") == {}


def test_s9_tokens_that_a_model_was_loaded_with_are_not_saved(tmp_path: Path) -> None:
    from tests.helpers import tiny_tokenizer
    from trl import AutoModelForCausalLMWithValueHead
    from trl.pretrained import load_tokenizer

    tiny_gpt2().save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "start", token=HUB)
    trainer = make_trainer(model=model, tokenizer=load_tokenizer(str(tmp_path / "start"), token=HUB))
    trainer.save_pretrained(tmp_path / "saved")
    assert leaks_of_folder(tmp_path / "saved") == {}
