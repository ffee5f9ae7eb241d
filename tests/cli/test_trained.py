"""`trl eval`, `trl generate` and `trl chat` on a finished run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.cli.helpers import REWARDS
from trl.cli.app import main


@pytest.fixture(autouse=True)
def in_the_project(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run)


def test_eval_compares_with_the_base(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["eval", "run"]) == 0
    printed, said = capsys.readouterr()
    assert "trained on" not in said  # the run held out 8
    assert printed.startswith("8 prompts; ") and "trained" in printed and "base" in printed and "win rate" in printed
    assert caplog.messages == []  # loading the run's own checkpoint finds nothing changed


def test_eval_says_that_it_has_only_the_prompts_of_the_training(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.OnlineTrainer.evaluate", lambda self, prompts, *rest, **options: f"{prompts}")
    assert main(["eval", "run", "--held-out", "0"]) == 0
    assert "the run held out no prompts: these are the ones it was trained on" in capsys.readouterr().err


def test_eval_on_other_prompts_and_another_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "It was"}\n{"prompt": "A film"}\n')
    (tmp_path / "other.py").write_text(REWARDS)
    assert (
        main(
            [
                "eval",
                "run",
                "--prompts",
                str(tmp_path / "p.jsonl"),
                "--reward",
                f"{tmp_path}/other.py:polite",
                "--held-out",
                "0",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("2 prompts; ")


def test_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "runs/run", "--prompt", "It was", "--samples", "2", "--max-new-tokens", "5"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.count("It was") == 2 and first.count("---\n") == 2
    assert main(words) == 0
    assert capsys.readouterr().out == first  # the same seed
    assert main([*words, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first
    monkeypatch.setattr("sys.stdin", io.StringIO("A film\n\nIt\n"))
    assert main(["generate", "tiny-gpt2-reviews"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A film") and "\nIt" in printed


def test_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["The film", "", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert main(["chat", "run", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3

    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main(["chat", "run"]) == 0


def test_text_of_the_model_is_stripped_of_control_sequences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S8."""
    from trl.cli.trained import Speaker

    monkeypatch.setattr(Speaker, "respond", lambda *arguments, **options: ["\x1b[2J\x07 evil \u202e text"])
    assert main(["generate", "runs/run", "--prompt", "\x1b]0;x\x07It"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "runs/run", "--prompt", "x", "--samples", "0"], "--samples: 0 is less than 1"),
        (["generate", "runs/run", "--prompt", "x", "--temperature", "0"], "--temperature: 0.0 must be above 0"),
        (["generate", "runs/run", "--prompt", "x", "--max-new-tokens", "many"], "'many' is not a whole number"),
        (["eval", "runs/nothing"], "there is no run"),
        (["eval", "run", "--lerning-rate", "1"], "did you mean --learning-rate?"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trl.trackers import RunDirectory

    RunDirectory.create(tmp_path / "new").close()
    assert main(["generate", str(tmp_path / "new"), "--prompt", "x"]) == 2
    assert "has no model yet" in capsys.readouterr().err


def test_a_model_folder_that_leads_out_of_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S10."""
    from trl.trackers import RunDirectory

    RunDirectory.create(tmp_path / "new").close()
    (tmp_path / "new" / "model").symlink_to(Path("runs/run/model").resolve())
    assert main(["generate", str(tmp_path / "new"), "--prompt", "x"]) == 2
    assert "has no model" in capsys.readouterr().err
