"""The managed loop: what it does with prompts, scores and statistics, and how it ends."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from tests.helpers import assert_close
from tests.trainer.managed import HELD_OUT, PROMPTS, bits, events, fresh, recorded, run, words
from trl import AutoModelForCausalLMWithValueHead, TrainCallback
from trl.core import LengthSampler
from trl.data import PromptSampler, load_prompts
from trl.rewards import ErrorBudget, RewardErrors, RewardFailed, as_reward
from trl.runs.managed import NothingScored
from trl.trackers import read_completions, read_metrics

# The loop ------------------------------------------------------------------------------------------------------------


def test_the_loop_is_generate_score_step(tmp_path: Path) -> None:
    """Worked out with the public pieces alone."""
    by_hand = fresh()
    prompts = load_prompts(PROMPTS, by_hand.tokenizer)
    sampler = PromptSampler(len(prompts), batch_size=4, seed=0)
    expected = []
    for _ in range(3):
        batch = [prompts[i] for i in sampler.next()]
        queries = [p.tokens for p in batch]
        sampling = dict(max_new_tokens=5, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=[1])
        responses = by_hand.generate(queries, return_prompt=False, **sampling)
        texts = [by_hand.tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        scores = [torch.tensor(score) for score in words([p.text for p in batch], texts)]
        expected.append(by_hand.step(queries, list(responses), scores))
    trainer = fresh()
    result = run(trainer, run_dir=tmp_path / "run")
    assert bits(trainer)["weights"] == bits(by_hand)["weights"]
    assert (result.steps, result.episodes, result.reason) == (3, 12, "steps")
    for row, stats in zip(read_metrics(tmp_path / "run"), expected, strict=True):
        for name, value in stats.items():
            if isinstance(value, float) and "time/" not in name and "memory/" not in name:
                assert row[name] == value, name


def test_samples_are_recorded_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    def brevity(prompts: Any, completions: Any, completion_ids: Any) -> Any:
        return [[-0.5] * len(ids) for ids in completion_ids]

    trainer = fresh()
    rows = [{"prompt": text, "prompt_id": f"p{i}"} for i, text in enumerate(PROMPTS)]
    run(trainer, rows, reward={"words": words, "brevity": brevity}, run_dir=tmp_path / "run", steps=1)
    samples = read_completions(tmp_path / "run", 1)
    assert len(samples) == 4 and len({s["prompt_id"] for s in samples}) == 4
    for sample in samples:
        prompt = next(row for row in rows if row["prompt_id"] == sample["prompt_id"])
        assert sample["prompt"] == prompt["prompt"]
        assert sample["reward/words"] == words([sample["prompt"]], [sample["completion"]])[0]
        assert sample["reward/brevity"] == -0.5 * sample["length"]
        assert sample["score"] == pytest.approx(sample["reward/words"] + sample["reward/brevity"])
        assert len(sample["completion"].split()) <= sample["length"]  # special tokens count and are not shown
        assert sample["finish_reason"] in ("stop", "length")
        assert sample["length"] == 5 or sample["finish_reason"] == "stop"
        assert sample["time/reward"] >= 0 and sample["error"] is None
    row = read_metrics(tmp_path / "run")[0]
    assert_close(sum(s["kl"] for s in samples) / 4, row["objective/kl"])
    assert_close(sum(s["score"] for s in samples) / 4, row["score/mean"])
    experience = trainer.last_experience
    assert experience is not None
    for sample, advantages, mask in zip(samples, experience.advantages, experience.rollout.mask):
        assert_close(sample["advantage"], advantages[mask].mean())
    assert any(s["advantage"] != 0 for s in samples)


def test_rewards_of_tokens_are_not_added_to_the_score() -> None:
    """The return of the first token is the sum of all rewards, once."""

    def price(prompts: Any, completions: Any, completion_ids: Any) -> Any:
        return [[-1.0] * len(ids) for ids in completion_ids]

    for case in ("plain sgd", "seq2seq"):
        trainer = fresh(case, use_score_scaling=False, use_score_norm=False, init_kl_coef=0.0, lam=1.0)
        run(trainer, reward=price, steps=1)
        experience = trainer.last_experience
        assert experience is not None
        for returns, mask in zip(experience.returns, experience.rollout.mask):
            assert_close(returns[mask][0], -float(mask.sum()), tol=1e-4)


def test_columns_reach_the_reward() -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, answer: Any) -> Any:
        seen.extend(zip(prompts, answer))
        return [0.0] * len(prompts)

    run(prompts=[{"prompt": p, "answer": i} for i, p in enumerate(PROMPTS)], reward=reward)
    assert len(seen) == 12 and all(PROMPTS[answer] == prompt for prompt, answer in seen)


@pytest.mark.parametrize(("episodes", "steps"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_episodes_are_rounded_up_to_steps(episodes: int, steps: int) -> None:
    result = run(fresh("lora"), episodes=episodes)
    assert (result.steps, result.episodes) == (steps, 4 * steps)


def test_every_prompt_is_taken_once_an_epoch_of_a_size_that_does_not_divide(tmp_path: Path) -> None:
    run(run_dir=tmp_path / "run", steps=5)
    taken = Counter(s["prompt_id"] for step in range(1, 6) for s in read_completions(tmp_path / "run", step))
    assert taken == {str(i): 2 for i in range(10)}
    assert [row["run/epoch"] for row in read_metrics(tmp_path / "run")] == [0.4, 0.8, 1.2, 1.6, 2.0]


def test_the_same_seed_gives_the_same_metrics(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(fresh(seed=seed), run_dir=tmp_path / name, eval_prompts=HELD_OUT)
    assert recorded(tmp_path / "a") == recorded(tmp_path / "b")
    assert recorded(tmp_path / "a") != recorded(tmp_path / "c")


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(steps=1, eval_prompts=HELD_OUT, on_spike="rollback")
    assert (result.run_dir, result.last, result.best) == (None, None, None)
    assert list(tmp_path.iterdir()) == []
    assert math.isfinite(result.metrics["score/mean"])


def test_the_model_at_the_end_is_that_of_the_trainer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = fresh()
    run(trainer, run_dir=tmp_path / "run", steps=1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    whole = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "run/model").state_dict()
    policy = {n.removeprefix("pretrained_model."): p for n, p in trainer.model.named_parameters()}
    assert all(torch.equal(plain[name], p) for name, p in policy.items() if not name.startswith("v_head"))
    head = {name: p for name, p in trainer.model.named_parameters() if name.startswith("v_head")}
    assert head and all(torch.equal(whole[name], p) for name, p in head.items())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["reason"], summary["steps"], summary["run/disk_errors"]) == ("steps", 1, 0)
    assert (tmp_path / "run/config.resolved.yaml").read_text().count("max_new_tokens: 5") == 1


# Rewards that have no score ------------------------------------------------------------------------------------------


def test_a_sample_without_a_score_is_left_out_and_counted(tmp_path: Path) -> None:
    def picky(prompts: Any, completions: Any) -> Any:
        return [None if prompt == PROMPTS[0] else 2.0 for prompt in prompts]

    trainer = fresh()
    run(trainer, reward=picky, run_dir=tmp_path / "run", steps=5)
    rows, samples = recorded(tmp_path / "run")
    left_out = [sum(sample["score"] is None for sample in some) for some in samples]
    assert sum(left_out) == 2  # twice in two epochs
    assert [row["reward/excluded"] for row in rows] == [count / 4 for count in left_out]
    assert all(row["score/mean"] == row["ppo/mean_scores"] == 2.0 for row in rows)
    assert trainer.score_moments.count == 5 * 4 - 2
    for some in samples:
        for sample in some:
            assert (sample["advantage"] is None) == (sample["kl"] is None) == (sample["score"] is None)
            assert (sample["prompt_id"] == "0") == (sample["score"] is None)


@pytest.mark.parametrize(("on_error", "excluded"), [("skip", 0.25), ("penalty", 0.0)])
def test_a_score_above_float32_costs_its_sample_and_no_moments(tmp_path: Path, on_error: str, excluded: float) -> None:
    def huge(prompts: Any, completions: Any) -> Any:
        return [1e39, *words(prompts, completions)[1:]]

    trainer = fresh(use_score_scaling=True, use_score_norm=True)
    reward = as_reward(huge, on_error=on_error, penalty=-1.0 if on_error == "penalty" else None)
    run(trainer, reward=reward, run_dir=tmp_path)
    rows = read_metrics(tmp_path)
    assert [(row["reward/errors"], row["reward/excluded"]) for row in rows] == [(0.25, excluded)] * 3
    scores = [sample["score"] for step in (1, 2, 3) for sample in read_completions(tmp_path, step)]
    known = [score for score in scores if score is not None]
    assert trainer.score_moments.count == len(known) == 12 * (1 - excluded)
    assert trainer.score_moments.mean == pytest.approx(sum(known) / len(known), rel=1e-6)
    assert math.isfinite(trainer.score_moments.squares)


def test_batches_without_any_score_are_skipped_and_end_the_run_in_the_end(tmp_path: Path) -> None:
    calls = iter([True, False, True, True, True])

    def nothing(prompts: Any, completions: Any) -> Any:
        return [None if empty else 1.0 for empty in [next(calls)] * len(prompts)]

    trainer = fresh("plain sgd")
    with pytest.raises(NothingScored, match="3 batches in a row have no scored sample"):
        run(trainer, reward=nothing, steps=9, run_dir=tmp_path / "run", save_every=1)
    rows, _ = recorded(tmp_path / "run")
    assert [row["run/skipped_batches"] for row in rows] == [1, 1, 2, 3]  # the fifth step is not one
    assert trainer._trl_steps_done == 1
    assert "failed in step 5: NothingScored" in events(tmp_path / "run")[-1]


def test_an_error_budget_goes_on_through_a_resumption(tmp_path: Path) -> None:
    """Two errors are allowed; one came before the interruption, two after it."""
    sampler = PromptSampler(len(PROMPTS), batch_size=4, seed=0)
    first, second = sampler.next(), sampler.next()
    bad = {PROMPTS[i] for i in (first[0], *second[:2])}

    def fragile(prompts: Any, completions: Any) -> Any:
        return [ValueError("no") if prompt in bad else 1.0 for prompt in prompts]

    class Stop(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> bool:
            return step == 1

    def guarded() -> Any:
        return as_reward(fragile, on_error="skip", budget=ErrorBudget(share=0.02, window=100))

    run(reward=guarded(), steps=2, run_dir=tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(RewardErrors, match="3 of the last"):
        run(reward=guarded(), steps=2, run_dir=tmp_path / "run", resume="auto")


def test_a_reward_that_must_not_fail_ends_the_run(tmp_path: Path) -> None:
    def broken(prompts: Any, completions: Any) -> Any:
        raise KeyError("nothing here")

    with pytest.raises(RewardFailed, match="nothing here"):
        run(reward=broken, run_dir=tmp_path / "run")
    assert events(tmp_path / "run")[-1].startswith("failed in step 1: RewardFailed")
    assert not any("removed" in line for line in events(tmp_path / "run"))  # there was nothing to remove
    run(run_dir=tmp_path / "run", resume="auto", steps=1)  # nobody holds the run any more


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_draws_nothing_from_the_run(tmp_path: Path) -> None:
    def noisy(prompts: Any, completions: Any) -> Any:
        return [random.random() + np.random.rand() + float(torch.rand(())) for _ in prompts]

    ends = []
    for name, arguments in (("without", {}), ("with", {"eval_prompts": HELD_OUT, "eval_every": 1})):
        trainer = fresh()  # which seeds the generators
        run(trainer, reward=noisy, run_dir=tmp_path / name, **arguments)
        ends.append(bits(trainer))
    assert ends[0] == ends[1]
    without, _ = recorded(tmp_path / "without")
    rows, _ = recorded(tmp_path / "with")
    assert [{k: v for k, v in row.items() if not k.startswith("eval")} for row in rows] == without


def test_an_evaluation_of_the_same_weights_is_the_same(tmp_path: Path) -> None:
    trainer = fresh("plain sgd", learning_rate=0.0)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.lr_scheduler = None
    run(trainer, run_dir=tmp_path / "run", eval_prompts=HELD_OUT, eval_every=2, steps=5)
    every = recorded(tmp_path / "run")[0]
    rows = [row for row in every if "eval/score_mean" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    found = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in rows]
    assert found[0] == found[1] == found[2]
    before = {k.replace("eval_before/", "eval/"): v for k, v in every[0].items() if k.startswith("eval_before/")}
    assert before == found[0] and not any(k.startswith("eval_before/") for row in every[1:] for k in row)
    assert abs(found[0]["eval/kl"]) < 1e-5  # policy and reference are the same
    assert 0 < found[0]["eval/score_mean"] < 1 and 1 <= found[0]["eval/length"] <= 5
    assert found[0]["eval/excluded"] == 0.0


def test_an_evaluation_counts_every_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven prompts in batches of four; and on three processes, of which the last two have to make prompts up."""
    from trl.runs import evaluation

    prompts = [f"w{40 + i}" for i in range(7)]
    seen: list[str] = []

    def counted(prompts: Any, completions: Any) -> Any:
        seen.extend(prompts)
        return [float(prompt.split()[0][1:]) for prompt in prompts]

    result = run(reward=counted, eval_prompts=prompts, steps=1)
    assert result.metrics["eval/score_mean"] == 43.0
    assert result.metrics["eval/score_std"] == 2.0
    assert sorted(seen[:7]) == sorted(seen[11:]) == prompts  # before the step and after it

    trainer = fresh()
    loaded, told = load_prompts(prompts[:4], trainer.tokenizer), []
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 3))
    passes, one = [], {"score": 1.0, "kl": 0.0, "length": 1, "finished": True}
    for rank in range(3):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self, rank=rank: rank))
        monkeypatch.setattr(
            evaluation, "score_samples", lambda t, r, drawn, _: passes.append(len(drawn.samples)) or r(drawn)
        )
        monkeypatch.setattr(evaluation, "share_json", lambda _, rows: told.append(rows) or [[one]])
        by_word = lambda drawn: as_reward(counted).score(drawn.samples)  # noqa: E731
        evaluation.evaluate_prompts(trainer, loaded, by_word, {"max_new_tokens": 2})
    assert passes == [2, 2, 2]  # as many forward passes everywhere
    assert [[row["score"] for row in part] for part in told] == [[40.0, 41.0], [42.0, 43.0], []]


# Callbacks -----------------------------------------------------------------------------------------------------------


def test_callbacks_see_everything_and_can_end_the_run(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watch(TrainCallback):
        def on_start(self, trainer: Any, step: int) -> None:
            seen.append(("start", step))

        def on_step(self, trainer: Any, step: int, row: Any) -> bool:
            seen.append(("step", step, row["run/episodes"]))
            return step == 2

        def on_save(self, trainer: Any, step: int, path: Path) -> None:
            seen.append(("save", step, path.name))

        def on_end(self, trainer: Any, result: Any) -> None:
            seen.append(("end", result.reason))

    result = run(run_dir=tmp_path / "run", callbacks=[Watch(), TrainCallback()], steps=5, save_every=2)
    assert (result.steps, result.reason) == (2, "callback")
    assert seen == [
        ("start", 0), ("step", 1, 4), ("step", 2, 8), ("save", 2, "step-00000002"), ("end", "callback"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "run/summary.json").read_text())["reason"] == "callback"


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 4, "steps": 3}, "steps=3 and episodes=4: set exactly one"),
        ({"steps": None}, "steps=None and episodes=None: set exactly one"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"save_every": 1.5}, "save_every=1.5 must be"),
        ({"keep_last": None}, "keep_last=None must be"),
        ({"resume": 0}, "resume=0 must be one of False, True, 'auto'"),
        ({"generation": {"max_new_tokens": None}}, "max_new_tokens=None must be a whole number"),
        ({"resume": "yes"}, "resume='yes' must be one of False, True, 'auto'"),
        ({"on_spike": "panic"}, "on_spike='panic' must be one of None, 'warn', 'skip', 'rollback'"),
        ({"on_disk_error": "x"}, "on_disk_error='x' must be one of 'stop', 'go_on'"),
        ({"resume": True}, "resume=True needs the run_dir"),
        ({"eval_every": 2}, "eval_every=2 needs eval_prompts"),
        ({"generation": {"return_prompt": True}}, "must not contain return_prompt"),
        ({"generation": {"max_new_tokens": 64}}, "max_new_tokens=64 leaves no room for a prompt"),
        ({"generation": {"max_new_tokens": 62}}, "more than max_tokens=2"),
        ({"length_sampler": LengthSampler(2, 65)}, "max_new_tokens=64 leaves no room for a prompt"),
        ({"length_sampler": LengthSampler(2, 63)}, "more than max_tokens=2"),
        ({"length_sampler": lambda: 3, "generation": {"max_new_tokens": 62}}, "more than max_tokens=2"),
        ({"prompts": []}, "there are no prompts"),
        ({"reward": 3}, "expected a function"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_happens(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    trainer = fresh()
    before = bits(trainer)
    with pytest.raises(ValueError, match=message):
        run(trainer, **({"run_dir": tmp_path / "run"} if arguments != {"resume": True} else {}), **arguments)
    assert bits(trainer) == before
    assert not (tmp_path / "run").exists()


def test_a_length_sampler_of_unknown_range_is_held_to_the_room(caplog: pytest.LogCaptureFixture) -> None:
    """The longest prompt and its response fill the context of 64 tokens to the last; what was drawn beyond is said once."""
    lengths = iter([3, 80, 4, 90, 5, 100])
    prompts = [" ".join(["w50"] * n) for n in (55, 20, 30, 40)]
    drawn: list[int] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        drawn.extend(len(ids) for ids in completion_ids)
        return words(prompts, completions)

    with caplog.at_level("WARNING", logger="trl"):
        run(
            prompts=prompts,
            reward=reward,
            length_sampler=lambda: next(lengths),
            generation={"eos_token_id": None},
            steps=6,
        )
    assert drawn == [3] * 4 + [9] * 4 + [4] * 4 + [9] * 4 + [5] * 4 + [9] * 4
    said = [r.getMessage() for r in caplog.records if "length_sampler drew" in r.getMessage()]
    assert (
        len(said) == 1 and "drew 80 new tokens, but the longest prompt has 55 tokens and leaves room for 9" in said[0]
    )


def test_a_length_sampler_of_known_range_leaves_room() -> None:
    """Every prompt that is taken has room for the longest response: 59 + 5 = 64."""
    lengths = []
    prompts = [" ".join(["w50"] * n) for n in (59, 20, 30, 40)]
    reward = lambda prompts, completions, completion_ids: lengths.extend(map(len, completion_ids)) or [0.0] * 4  # noqa: E731
    run(prompts=prompts, reward=reward, length_sampler=LengthSampler(2, 6), generation={"eos_token_id": None}, steps=4)
    assert set(lengths) <= {2, 3, 4, 5} and max(lengths) == 5
    with pytest.raises(ValueError, match="more than max_tokens=59"):
        run(prompts=[*prompts, " ".join(["w50"] * 60)], length_sampler=LengthSampler(2, 6))


@pytest.mark.parametrize(
    ("sampler", "given", "length"), [(LengthSampler(2, 4), {}, 3.0), (LengthSampler(2, 4), {"max_new_tokens": 6}, 6.0), (lambda: 2, {"max_new_tokens": 5}, 5.0)]
)  # fmt: skip
def test_held_out_responses_may_be_as_long_as_those_of_training(
    sampler: Any, given: dict[str, Any], length: float
) -> None:
    generation = given | {"eos_token_id": None}
    result = run(length_sampler=sampler, generation=generation, eval_prompts=HELD_OUT, steps=1)
    assert result.metrics["eval/length"] == result.metrics["eval_before/length"] == length


def test_chat_templates_in_folders_of_their_own_are_written_with_the_model(tmp_path: Path) -> None:
    trainer = fresh()
    trainer.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}!"}
    run(trainer, run_dir=tmp_path / "run", steps=1)
    assert (tmp_path / "run/model/additional_chat_templates/tool_use.jinja").is_file()


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fresh()
    before = bits(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: DistributedType.FSDP))
        with pytest.raises(ValueError, match="sharded over processes by FSDP cannot be checkpointed"):
            run(trainer, run_dir=tmp_path / "run")
    assert bits(trainer) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "x" * 300])
def test_a_bad_name_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        run(run_dir=f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []
