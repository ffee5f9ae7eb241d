"""C1 and C2: unknown names at any depth with file and line; defaults < files < environment < flags, and their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl.cli import catalogue, reward_sources
from trl.cli.problems import UsageError
from trl.cli.resolve import Flag, Resolved, resolve


def flag(path: str, *texts: str) -> Flag:
    return Flag(setting=catalogue.settings()[path], texts=texts, spelling=catalogue.shortest_flag(path))


def resolved(*files: str, environment: dict[str, str] | None = None, flags: tuple[Flag, ...] = ()) -> Resolved:
    return resolve("ppo", files=files, environment=environment or {}, flags=flags)


def test_later_sources_count_and_each_value_knows_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ppo:\n  lam: 0.1\n  gamma: 0.1\n  vf_coef: 0.1\n  cliprange: 0.1\n")
    (tmp_path / "b.yaml").write_text("ppo:\n  gamma: 0.2\n  vf_coef: 0.2\n\n  cliprange: 0.2\n")
    environment = {"TRL_PPO__VF_COEF": "0.3", "TRL_PPO__CLIPRANGE": "0.3", "TRL_KERNELS": "off", "PATH": "x"}
    found = resolved("a.yaml", "b.yaml", environment=environment, flags=(flag("ppo.cliprange", "0.4"),))
    expected = {
        "target": (6, "default"),
        "lam": (0.1, "a.yaml:2"),
        "gamma": (0.2, "b.yaml:2"),
        "vf_coef": (0.3, "environment TRL_PPO__VF_COEF"),
        "cliprange": (0.4, "--cliprange"),
    }
    assert {name: (found[f"ppo.{name}"], found.sources[f"ppo.{name}"]) for name in expected} == expected
    config = found.section("ppo")
    assert (config.lam, config.gamma, config.vf_coef, config.cliprange) == (0.1, 0.2, 0.3, 0.4)


def test_a_command_may_have_a_default_of_its_own() -> None:
    found = resolve("grpo", environment={})
    assert found["ppo.group_size"] == 8 and found.sources["ppo.group_size"] == "default of trl grpo"
    assert resolve("ppo", environment={})["ppo.group_size"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pppo:\n  seed: 1\n", "c.yaml:1: pppo is no setting: did you mean ppo?"),
        ("ppo:\n\n  lerning_rate: 1\n", "c.yaml:3: ppo.lerning_rate is no setting: did you mean learning_rate?"),
        ("lerning_rate: 1\n", "c.yaml:1: lerning_rate is no setting: did you mean learning_rate?"),
        ("ppo:\n  learning_rate: fast\n", "c.yaml:2: ppo.learning_rate: 'fast' is not a number or null"),
        ("ppo:\n  learning_rate: -1\n", "c.yaml:2: ppo.learning_rate=-1.0 must be a number from 0 to inf"),
        ("ppo:\n  seed: 3\n  batch_size: 6\n  mini_batch_size: 4\n", "c.yaml:3: ppo.batch_size=6 is not a multiple"),
        ("train:\n  run_dir: a\n  run_name: b\n", "c.yaml:2: train.run_dir='a' and run_name='b': set one of them"),
        ("lora: {alpha: 3}\n", "c.yaml:1: lora.alpha=3 needs r"),
        ("generation:\n  top_p: 2\n", "c.yaml:2: generation.top_p=2.0 must be above 0 and at most 1"),
        ("on_error: skip\n", "c.yaml:1: on_error is no setting: use reward.on_error"),
        ("grpo:\n  beta: 1\n", "c.yaml:2: grpo.beta is no setting: use ppo.init_kl_coef, or grpo.kl_coef for GRPO"),
        ("reward:\n  functions: [a:f, b:f]\n", "c.yaml:2: reward.functions='b:f' has the name 'f' of another reward"),
        ("reward:\n  functions: [a:f]\n  weights: [1, 2]\n", "c.yaml:3: reward.weights=[1.0, 2.0] has 2 numbers for 1 rewards"),
        ("reward:\n  functions: a:f\n  weights:\n    g: 1\n", "c.yaml:3: reward.weights='g' is no reward; the rewards are f"),
    ],
)  # fmt: skip
def test_a_problem_has_its_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as raised:
        resolved("c.yaml")
    assert said in str(raised.value).replace("\n", " ")


def test_an_unknown_key_four_levels_deep_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "reward:\n  functions:\n    short: length-penalty\n  options:\n    short:\n      per_unit: 1\n      longst: 3\n"
    )
    with pytest.raises(UsageError, match=r"c.yaml:7: length-penalty has no option longst: did you mean longest\?"):
        reward_sources.check(resolved("c.yaml"))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("foo: 1\nppo: {sed: 1, lam: x}\ntrain: [1]\n")
    with pytest.raises(UsageError) as raised:
        resolved("c.yaml", "missing.yaml", environment={"TRL_PPO__SEDE": "1"}, flags=(flag("ppo.gamma", "x"),))
    assert [problem.where for problem in raised.value.problems] == [
        "c.yaml:1", "c.yaml:2", "c.yaml:2", "c.yaml:3", "missing.yaml", "environment TRL_PPO__SEDE", "--gamma",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("TRL_PPO__LERNING_RATE", "ppo.lerning_rate is no setting: did you mean learning_rate?"),
        ("TRL_PPOO__SEED", "ppoo is no section: did you mean ppo?"),
        ("TRL_PPO_SEED", "it sets nothing: write TRL_PPO__SEED"),
        ("TRL_PPO_SEDE", "it sets nothing"),
        ("TRL_TRAIN__STEPS", "train.steps: 'x' is not a whole number or null"),
    ],
)
def test_a_mistake_in_the_environment(variable: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolved(environment={variable: "x"})
    assert f"environment {variable}: {said}" in str(raised.value)


def test_names_of_trl_1_and_flat_keys_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: gpt2\nlearning_rate: 1e-6\nnum_generations: 4\nmax_completion_length: 9\noutput_dir: out\n"
        "reward_funcs: [a:f, b:g]\nreward_weights: [1, 2]\nlora_r: 8\nlr_scheduler_type: linear\n"
    )
    found = resolved("c.yaml")
    assert {
        "model.name": "gpt2", "ppo.learning_rate": 1e-6, "ppo.group_size": 4, "generation.max_new_tokens": 9,
        "train.run_dir": "out", "reward.functions": {"f": "a:f", "g": "b:g"}, "reward.weights": {"f": 1.0, "g": 2.0},
        "lora.r": 8, "train.schedule": "linear",
    }.items() <= dict(found.values).items()  # fmt: skip


def test_sections_given_as_values(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: gpt2\ndata: p.jsonl\nreward: r.py:f\n")
    found = resolved("c.yaml")
    assert (found["model.name"], found["data.prompts"], found["reward.functions"]) == (
        "gpt2",
        "p.jsonl",
        {"f": "r.py:f"},
    )


def test_several_rewards_by_flags() -> None:
    found = resolved(flags=(flag("reward.functions", "polite=r.py:f", "classifier:a/b"),))
    assert found["reward.functions"] == {"polite": "r.py:f", "b": "classifier:a/b"}


def test_rewards_are_named_by_their_last_word() -> None:
    from trl.cli.sections import RewardSettings  # trl.cli.sections

    named = RewardSettings(functions=["a/b.py:polite", "classifier:org/model", "other=c:d", "length-penalty"]).functions
    assert list(named) == ["polite", "model", "other", "length-penalty"]
