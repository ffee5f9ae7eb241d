"""What bfloat16 passes change: in the gradients of a PPO step, layer by layer, and in what a run learns.

    python bench/precision.py gradients --out runs/precision                      # the tiny model of the package
    python bench/precision.py gradients --model data/smollm2-135m --out runs/precision
    python bench/precision.py learning --seeds 5 --out runs/precision             # the demo's job, five runs in each way
    python bench/precision.py lost --model data/smollm2-135m --out runs/precision    # updates that bfloat16 weights do not see

`gradients`: responses are sampled and scored once; the loss of the first minibatch (PPO's, with rewards, advantages and
returns of the float64 model, and each arithmetic's own log-probabilities as the old ones) is differentiated in float64, in
float32, and in bfloat16 on float32 weights as PPOConfig.dtype="bfloat16" does it. `learning`: mean P(POSITIVE) and KL of the
last tenth of the batches of the demo, in float32, with bfloat16 passes, and with bfloat16 moments of Adam too. `lost`: a step of
Adam moves a weight by about the learning rate; the share of weights that stay where they are if they are held in bfloat16. All print Markdown and write it and JSON to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl.assets
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.algorithms.ppo import PPOSettings, ppo_loss, ppo_minibatches
from trl.core import set_seed
from trl.demo.outcome import DemoSettings
from trl.demo.run import Demo, log_odds, split_prompts
from trl.models.precision import NarrowCopies
from trl.rewards import ClassifierReward
from trl.trackers import read_metrics
from trl.training.batched import evaluate_in_batches
from trl.training.loop import microbatches
from trl.training.modes import eval_mode
from trl.types import ActorCritic, occupied, take

Row = dict[str, Any]
Passes = Callable[[], AbstractContextManager[Any]]


# Gradients -----------------------------------------------------------------------------------------------------------


def sampled(folder: str, args: argparse.Namespace) -> tuple[Any, ActorCritic, PPOConfig]:
    """The float64 model at its start, and what a step learns from: responses to the demo's prompts, scored by its classifier."""
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder).double()
    config = PPOConfig(
        seed=args.seed, batch_size=args.batch, mini_batch_size=args.mini, ppo_epochs=1, learning_rate=0.0, dtype="float32"
    )  # fmt: skip
    trainer = PPOTrainer(config, model, None, tokenizer)
    queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in split_prompts()[0][: args.batch]]
    responses = trainer.generate(
        queries, batch_size=args.batch, return_prompt=False, max_new_tokens=args.new, do_sample=True, top_k=0
    )
    judge = ClassifierReward.from_pretrained(trl.assets.path("tiny-bert-sentiment"), output="probability")
    texts = [[str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows] for rows in (queries, responses)]
    scores = [torch.tensor(log_odds(p, DemoSettings().score_clip)) for p in judge(*texts)]
    trainer.step(queries, list(responses), scores)  # at a learning rate of 0: the weights stay
    assert trainer.last_experience is not None
    for parameter in model.parameters():
        parameter.grad = None
    return model, trainer.last_experience, config


def gradient(model: Any, experience: ActorCritic, config: PPOConfig, passes: Passes) -> dict[str, Tensor]:
    """Of the loss of the first minibatch, by parameter, float64."""
    size = int(config.mini_batch_size or 1)
    with eval_mode(model):
        with torch.no_grad(), passes():
            old = evaluate_in_batches(model, experience.rollout, batch_size=size, temperature=config.temperature)
        assert old.values is not None
        own = replace(experience, old_logprobs=old.logprobs, old_values=old.values)
        generator = torch.Generator().manual_seed(int(config.seed or 0))
        minibatch = next(ppo_minibatches(own, size=len(experience), epochs=1, generator=generator))
        loss = ppo_loss(model, PPOSettings(value_coef=float(config.vf_coef or 0), temperature=config.temperature))
        for piece in microbatches(minibatch.experience, size):
            with passes():
                objective = loss(take(piece, slice(None), occupied(piece.rollout.attention))).objective
                (objective / minibatch.denominator).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def group(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    if name.startswith("v_head"):
        return "value head"
    if found := re.search(r"\.(?:h|layers|blocks?)\.(\d+)\.", name):
        return f"layer {found[1]}"
    if re.search(r"wte|wpe|embed", name):
        return "embeddings"
    return "head" if re.search(r"lm_head|embed_out", name) else "last norm"


def compared(gradients: dict[str, dict[str, Tensor]]) -> list[Row]:
    """For each group of parameters how far the gradients of each arithmetic are from those of float64."""
    exact = gradients["float64"]
    groups: dict[str, list[str]] = {}
    for name in exact:
        groups.setdefault(group(name), []).append(name)
    groups["all"] = list(exact)
    rows = []
    for title, names in groups.items():
        want = torch.cat([exact[name].flatten() for name in names])
        row: Row = {"parameters": title, "count": want.numel(), "norm": float(want.norm())}
        for dtype in ("float32", "bfloat16"):
            got = torch.cat([gradients[dtype][name].flatten() for name in names])
            row[f"{dtype}_cosine"] = float(got @ want / (got.norm() * want.norm()).clamp(min=1e-300))
            row[f"{dtype}_error"] = float((got - want).norm() / want.norm().clamp(min=1e-300))
        rows.append(row)
    return rows


def gradients_markdown(rows: list[Row], what: str) -> str:
    lines = [
        f"Gradients of one PPO step of {what} against float64: cosine, and the norm of the difference over the norm.",
        "",
        "| parameters | norm | float32: 1 − cosine | difference | bfloat16: cosine | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['parameters']} | {r['norm']:.3g} | {max(0.0, 1 - r['float32_cosine']):.1e} | {r['float32_error']:.1e} | "
            f"{r['bfloat16_cosine']:.5f} | {r['bfloat16_error']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def narrow(model: nn.Module) -> Passes:
    copies = NarrowCopies(model)
    copies.refresh()
    return copies.stand_in


def measure_gradients(args: argparse.Namespace) -> tuple[str, Row, str]:
    folder = args.model or trl.assets.path("tiny-gpt2-reviews")
    model, experience, config = sampled(folder, args)
    found = {"float64": gradient(model, experience, config, nullcontext)}
    for dtype in ("float32", "bfloat16"):
        # float32 weights are those of the folder: doubled and back they are the same.
        own = copy.deepcopy(model).float()
        own.zero_grad()
        found[dtype] = gradient(
            own, as_float32(experience), config, narrow(own) if dtype == "bfloat16" else nullcontext
        )
        del own
    rows = compared(found)
    tokens = int(experience.rollout.mask.sum())
    name = Path(folder).name
    what = f"{name}, {len(experience)} responses of {tokens} tokens"
    report = {"model": name, "responses": len(experience), "tokens": tokens, "rows": rows}
    return gradients_markdown(rows, what), report, f"gradients-{name}"


def as_float32(experience: ActorCritic) -> ActorCritic:
    """What is known before the update, as a float32 step would have it."""
    names = ("scores", "old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
    return replace(experience, **{name: getattr(experience, name).float() for name in names})


# Learning ------------------------------------------------------------------------------------------------------------


# What is bfloat16, and how PPOConfig is asked for it; the others are compared with the first.
ARMS: dict[str, dict[str, str]] = {
    "nothing": {"dtype": "float32"},
    "passes": {"dtype": "bfloat16"},
    "passes and moments": {"dtype": "bfloat16", "optimizer_state_dtype": "bfloat16"},
}


def runs(args: argparse.Namespace) -> Iterator[Row]:
    """The demo's job, seed by seed in each arm."""
    for seed in range(args.seeds):
        for arm, settings in ARMS.items():
            with mock.patch("trl.demo.run.PPOConfig", partial(PPOConfig, **settings)):
                demo = Demo(DemoSettings(seed=seed, steps=args.steps))
            with tempfile.TemporaryDirectory() as folder:
                demo.train(Path(folder) / "run", progress=False)
                rows = read_metrics(Path(folder) / "run")
            last = rows[-max(1, len(rows) // 10) :]
            yield {
                "arm": arm,
                "seed": seed,
                "positive": statistics.mean(row["reward/positive/mean"] for row in last),
                "kl": statistics.mean(row["objective/kl"] for row in last),
                "seconds": sum(row["time/step"] - row["time/eval"] for row in rows),
                "curve": [row["reward/positive/mean"] for row in rows],
            }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error (not a number for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def learning_markdown(found: list[Row], steps: int) -> tuple[str, Row]:
    count = len(found) // len(ARMS)
    results: Row = {"runs": count, "steps": steps}
    lines = [
        f"The last tenth of the batches of {count} runs of {steps} steps each; ± is the standard error.",
        "",
        "| bfloat16 | P(POSITIVE) | KL, nats | seconds |",
        "| --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        own = [row for row in found if row["arm"] == arm]
        means = {key: mean_and_error([row[key] for row in own]) for key in ("positive", "kl", "seconds")}
        results[arm] = {key: {"mean": mean, "standard_error": error} for key, (mean, error) in means.items()}
        lines.append(
            f"| {arm} | {means['positive'][0]:.3f} ± {means['positive'][1]:.3f} | "
            f"{means['kl'][0]:.1f} ± {means['kl'][1]:.1f} | {means['seconds'][0]:.0f} |"
        )
    lines.append("")
    first, *others = ARMS
    for arm in others:
        for key, name in (("positive", "P(POSITIVE)"), ("kl", "KL")):
            wide, slim = results[first][key], results[arm][key]
            apart = abs(wide["mean"] - slim["mean"])
            reach = wide["standard_error"] + slim["standard_error"]
            overlaps = apart <= reach if not math.isnan(reach) else None
            results[arm][key]["overlaps"] = overlaps
            verdict = {True: "within", False: "outside of", None: "not to be told from"}[overlaps]
            lines.append(
                f"- {name}, {arm}: {apart:.3g} apart, {verdict} the two standard errors (together {reach:.3g})."
            )
    return "\n".join(lines) + "\n", results


def measure_learning(args: argparse.Namespace) -> tuple[str, Row, str]:
    found = []
    for row in runs(args):
        print(json.dumps({key: value for key, value in row.items() if key != "curve"}), flush=True)
        found.append(row)
    text, report = learning_markdown(found, args.steps)
    return text, report | {"by_run": found}, "learning"


# Updates that are lost ------------------------------------------------------------------------------------------------


def lost(weights: list[Tensor], size: float) -> float:
    """The share of weights that, held in bfloat16, are the same after `size` was taken off as after it was added."""
    kept = sum(int(((w.bfloat16() - size).bfloat16() == (w.bfloat16() + size).bfloat16()).sum()) for w in weights)
    return kept / sum(w.numel() for w in weights)


def measure_lost(args: argparse.Namespace) -> tuple[str, Row, str]:
    model = AutoModelForCausalLM.from_pretrained(
        args.model or trl.assets.path("tiny-gpt2-reviews"), dtype=torch.float32, trust_remote_code=False
    )
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    shares = {size: lost(weights, size) for size in args.sizes}
    lines = ["| an update of | leaves the same, of the weights in bfloat16 |", "| --- | --- |"]
    lines += [f"| {size:g} | {share:.1%} |" for size, share in shares.items()]
    return "\n".join(lines) + "\n", {"model": args.model, "shares": shares}, "lost"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("gradients")
    one.add_argument("--model", help="folder of a causal language model; else the tiny one of the package")
    for name, usual in (("batch", 16), ("mini", 4), ("new", 32), ("seed", 0)):
        one.add_argument(f"--{name}", type=int, default=usual)
    one.set_defaults(measure=measure_gradients)
    two = kinds.add_parser("learning")
    two.add_argument("--seeds", type=int, default=5)
    two.add_argument("--steps", type=int, default=DemoSettings().steps)
    two.set_defaults(measure=measure_learning)
    three = kinds.add_parser("lost")
    three.add_argument("--model", help="folder of a causal language model; else the tiny one of the package")
    three.add_argument("--sizes", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4], help="of an update of one weight")
    three.set_defaults(measure=measure_lost)
    for kind in (one, two, three):
        kind.add_argument("--out", type=Path, default=Path("runs/precision"))
    args = parser.parse_args(argv)
    text, report, name = args.measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (args.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
