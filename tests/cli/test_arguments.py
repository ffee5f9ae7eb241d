"""C4: spellings of flags; switches, values and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trl.cli.arguments import Invocation, read
from trl.cli.commands import COMMANDS
from trl.cli.problems import UsageError


def of(line: str, command: str = "ppo") -> Invocation:
    return read(COMMANDS[command], line.split())


def given(line: str) -> dict[str, Any]:
    return {flag.setting.path: flag.texts for flag in of(line).flags}


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate", "--ppo.learning-rate", "--ppo.learning_rate"])
@pytest.mark.parametrize("separator", [" ", "="])
def test_spellings(flag: str, separator: str) -> None:
    assert given(f"{flag}{separator}3e-4") == {"ppo.learning_rate": ("3e-4",)}


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("--output_dir x", "train.run_dir", "x"),
        ("--report-to=wandb", "ppo.log_with", "wandb"),
        ("--num_generations 4", "ppo.group_size", "4"),
        ("--model_name_or_path gpt2", "model.name", "gpt2"),
        ("--max_completion_length 9", "generation.max_new_tokens", "9"),
        ("--model gpt2", "model.name", "gpt2"),
        ("--data p.jsonl", "data.prompts", "p.jsonl"),
        ("--steps 3", "train.steps", "3"),
        ("--temperature 0.7", "ppo.temperature", "0.7"),
        ("--batch-size 8", "ppo.batch_size", "8"),
        ("--generation.batch-size 8", "generation.batch_size", "8"),
        ("--score-clip -1", "ppo.score_clip", "-1"),
        ("--whiten-rewards", "ppo.whiten_rewards", "true"),
        ("--whiten_rewards True", "ppo.whiten_rewards", "True"),
        ("--whiten-rewards=false", "ppo.whiten_rewards", "false"),
        ("--no-whiten-rewards", "ppo.whiten_rewards", "false"),
        ("--no-adap-kl-ctrl", "ppo.adap_kl_ctrl", "false"),
    ],
)
def test_flag(line: str, path: str, value: str) -> None:
    assert given(line) == {path: (value,)}


def test_a_switch_takes_no_file_name() -> None:
    found = of("--whiten-rewards run.yaml --dry-run other.yaml")
    assert found.arguments == ("run.yaml", "other.yaml") and found.has("dry-run")


def test_the_last_of_two_counts_and_rewards_add_up() -> None:
    assert given("--seed 1 --seed 2 --reward a:f --reward b:g") == {
        "ppo.seed": ("2",), "reward.functions": ("a:f", "b:g"),
    }  # fmt: skip


def test_options_of_a_command() -> None:
    found = read(
        COMMANDS["generate"], ["runs/x", "--prompt", "a b", "--prompt=c", "--samples", "3", "--temperature=.5"]
    )
    assert found.options["prompt"] == ("a b", "c")
    assert (found.number("samples"), found.number("temperature", float), found.number("seed")) == (3, 0.5, None)
    assert read(COMMANDS["generate"], ["--", "--x"]).arguments == ("--x",)


@pytest.mark.parametrize(
    ("line", "command", "said"),
    [
        ("--lerning-rate 3", "ppo", "--lerning-rate is no option of trl ppo: did you mean --learning-rate?"),
        ("--dry-rum", "ppo", "did you mean --dry-run?"),
        ("--per_device_train_batch_size 8", "ppo", "is no setting: use ppo.mini_batch_size"),
        ("--on-error skip", "ppo", "--on-error is no setting: use --reward.on-error"),
        ("--clip_range 0.1", "ppo", "is no setting: use ppo.cliprange, or grpo.clip_range for GRPO"),
        ("--bf16", "ppo", "use ppo.dtype: bfloat16"),
        ("--seed", "ppo", "--seed needs a value"),
        ("--seed --lam 1", "ppo", "--seed needs a value"),
        ("--dry-run=yes", "ppo", "--dry-run takes no value"),
        ("-x", "ppo", "options begin with two dashes"),
        ("--learning-rate 1 x", "generate", "is no option of trl generate"),
        ("", "resume", "0 arguments given usage: trl resume RUN"),
        ("a b", "resume", "2 arguments given"),
    ],
)
def test_refused(line: str, command: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        of(line, command)
    assert said in str(raised.value).replace("\n", " ")


def test_an_option_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="'many' is not a whole number"):
        of("x --samples many", "generate").number("samples")
