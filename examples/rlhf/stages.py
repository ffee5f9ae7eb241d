"""The stages: each reads the folders of earlier ones, and writes its own with the trained model in `model/`."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from texts import QUERIES, Data, TextSettings
from transformers import AutoModelForCausalLM

from trl import (
    AutoModelForCausalLMWithValueHead,
    BestOfNSampler,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    assets,
    set_seed,
)
from trl.files import write_atomic
from trl.functional.best_of_n import best_of_n_kl
from trl.functional.intervals import mean_estimate, proportion_estimate
from trl.pretrained import load_model, load_tokenizer
from trl.rewards import ClassifierReward, as_reward
from trl.runs.comparison import Comparison

BUNDLED = ("tiny-gpt2-reviews", "tiny-bert-sentiment")
KL_PROMPTS = 128  # on which the KLs of DPO's checkpoints and of PPO are compared
DEFAULTS = {"report_to": "none", "save_total_limit": 2, "gradient_checkpointing": False, "disable_tqdm": True}


class FromYaml:
    """Settings from the sections of a YAML file; one without a default must be there."""

    @classmethod
    def of(cls, given: Mapping[str, Any], path: Path) -> Any:
        """Returns the settings of a file's sections.

        Raises:
            ValueError: if a section is unknown or missing.
        """
        entries = fields(cls)  # type: ignore[arg-type]  # subclasses are dataclasses
        known = {entry.name for entry in entries}
        needed = {entry.name for entry in entries if entry.default is MISSING and entry.default_factory is MISSING}
        sections = set(given)
        if sections - known or needed - sections:
            raise ValueError(
                f"{path}: unknown sections: {', '.join(sorted(sections - known)) or 'none'}; missing: "
                f"{', '.join(sorted(needed - sections)) or 'none'}; expected: {', '.join(sorted(known))}"
            )
        return cls(**given)


@dataclass(frozen=True)
class Settings(FromYaml):
    """The YAML file."""

    base: str
    judge: str
    sft: dict[str, Any]
    reward: dict[str, Any]
    ppo: dict[str, Any]
    dpo: dict[str, Any]
    best_of_n: dict[str, int]
    data: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Stages:
    """A run of several stages in one folder: what SFT followed by PPO needs, whatever the data."""

    settings: Any
    root: Path
    seed: int

    @property
    def texts(self) -> TextSettings:
        return TextSettings(**self.settings.data)

    @property
    def sft_config(self) -> SFTConfig:
        return SFTConfig(str(self.root / "sft"), seed=self.seed, **DEFAULTS | self.settings.sft)

    @property
    def ppo_config(self) -> PPOConfig:
        settings = {name: value for name, value in self.settings.ppo.items() if name != "steps"}
        return PPOConfig(seed=self.seed, **settings)

    @property
    def generation(self) -> dict[str, Any]:
        return {"max_new_tokens": self.settings.max_new_tokens}

    def model(self, stage: str) -> str:
        """Returns the folder of a stage's model."""
        return str(self.root / stage / "model")

    def finish(self, trainer: Any, stage: str) -> dict[str, Any]:
        """Trains, from the last checkpoint if there is one, and saves the model."""
        output = trainer.train(resume_from_checkpoint="auto")
        trainer.save_model(self.model(stage))
        rows = "".join(json.dumps(row) + "\n" for row in trainer.state.log_history)
        write_atomic(self.root / stage / "metrics.jsonl", rows.encode())
        return {"steps": output.global_step, "loss": output.training_loss}

    def climb(self, trainer: PPOTrainer, prompts: str, reward: Any) -> dict[str, Any]:
        """Trains a policy with PPO, as a managed run in the folder `ppo`."""
        result = trainer.train(
            prompts,
            reward=reward,
            steps=self.settings.ppo["steps"],
            run_dir=self.root / "ppo",
            resume="auto",
            generation=self.generation,
        )
        return {"steps": result.steps, "kl": result.metrics.get("objective/kl")}


@dataclass(frozen=True)
class Pipeline(Stages):
    """From texts to an aligned decoder: SFT, a reward model, PPO, DPO and best-of-n."""

    def __post_init__(self) -> None:
        """Makes the settings of every stage, so that a wrong one is an error before the first stage."""
        self.texts, self.sft_config, self.reward_config, self.dpo_config, self.ppo_config  # noqa: B018

    @property
    def reward_config(self) -> RewardConfig:
        return RewardConfig(str(self.root / "reward"), seed=self.seed, **DEFAULTS | self.settings.reward)

    @property
    def dpo_config(self) -> DPOConfig:
        every = {"save_total_limit": None}  # the judged checkpoint is chosen from all of them
        return DPOConfig(str(self.root / "dpo"), seed=self.seed, **DEFAULTS | every | self.settings.dpo)

    @property
    def data(self) -> Data:
        return Data(self.root / "data")

    @property
    def stages(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The stages in their order: each returns what its result.json says."""
        return {
            "data": self.prepare,
            "sft": self.sft,
            "reward": self.reward,
            "ppo": self.ppo,
            "dpo": self.dpo,
            "judged": self.judge,
        }

    def prepare(self) -> dict[str, Any]:
        """Makes the data."""
        base, judge = named(self.settings.base), named(self.settings.judge)
        return self.data.write(self.texts, base=base, judge=judge, seed=self.seed)

    def sft(self) -> dict[str, Any]:
        """Fine-tunes the base to write the ending of a review."""
        trainer = SFTTrainer(named(self.settings.base), self.sft_config, train_dataset=self.data.sft)
        return self.finish(trainer, "sft")

    def reward(self) -> dict[str, Any]:
        """Trains a reward model on pairs, beginning with the SFT model, and counts right answers on held-out pairs."""
        data = self.data
        trainer = RewardTrainer(
            self.model("sft"), self.reward_config, train_dataset=data.pairs, eval_dataset=data.test_pairs
        )
        result = self.finish(trainer, "reward")
        metrics = trainer.evaluate()
        count = len(trainer.eval_dataset)
        result |= {name: metrics[f"eval_{name}"] for name in ("accuracy", "margin", "expected_calibration_error")}
        return result | {"pairs": count, "interval": asdict(proportion_estimate(result["accuracy"] * count, count))}

    def ppo(self) -> dict[str, Any]:
        """Trains the SFT model with PPO against the reward model."""
        return self.climb(self.ppo_trainer(self.model("sft")), self.data.prompts, self.reward_source())

    def dpo(self) -> dict[str, Any]:
        """Trains the SFT model with DPO on the reward model's pairs."""
        trainer = DPOTrainer(self.model("sft"), args=self.dpo_config, train_dataset=self.data.pairs)
        return self.finish(trainer, "dpo")

    # --- Judging ---

    def judge(self) -> dict[str, Any]:
        """Compares PPO, DPO and best-of-n with the SFT model on held-out prompts, by a classifier that was not the reward.

        DPO and best-of-n are judged at PPO's KL, as nearly as DPO's checkpoints and whole n allow.
        """
        judge = ClassifierReward.from_pretrained(named(self.settings.judge))
        ppo = self.compare(self.model("ppo"), self.data.test_prompts, judge)
        matched = self.dpo_at_kl_of_ppo()
        dpo = self.compare(str(self.root / "dpo" / f"checkpoint-{matched['step']}"), self.data.test_prompts, judge)
        base = {row.prompt: row.base_score for row in ppo.rows}
        return {
            "ppo": ppo.to_dict(),
            "dpo": dpo.to_dict() | matched,
            "best_of_n": self.best_of_n(judge, base, ppo.kl.value),
        }

    def compare(self, folder: str, prompts: Any, reward: Any) -> Comparison:
        """Compares a model with the SFT model."""
        return self.ppo_trainer(folder).evaluate(prompts, reward, generation=self.generation, seed=self.seed)

    def dpo_at_kl_of_ppo(self) -> dict[str, Any]:
        """Chooses the DPO checkpoint whose KL is nearest to PPO's, on prompts of the training and without any reward.

        Bisects, since the KL grows with the steps.
        """
        lines = Path(self.data.prompts).read_text(encoding="utf-8").splitlines()[:KL_PROMPTS]
        prompts = [json.loads(line)["prompt"] for line in lines]
        zeros = as_reward(lambda completions: [0.0] * len(completions))
        kls: dict[int, float] = {}

        def kl(step: int) -> float:
            if step not in kls:
                kls[step] = self.compare(str(self.root / "dpo" / f"checkpoint-{step}"), prompts, zeros).kl.value
            return kls[step]

        goal = self.compare(self.model("ppo"), prompts, zeros).kl.value
        steps = sorted(int(path.name.split("-")[1]) for path in (self.root / "dpo").glob("checkpoint-*"))
        above = bisect_left(steps, goal, key=kl)
        step = min(steps[max(above - 1, 0) : above + 1], key=lambda step: abs(kl(step) - goal))
        return {"step": step, "kls": kls, "kl_of_ppo": goal}

    def best_of_n(self, judge: ClassifierReward, base: dict[str, float], kl: float) -> dict[str, Any]:
        """Judges the best of n responses of the SFT model by the reward model, at about the given KL."""
        n = min(range(1, self.settings.best_of_n["most"] + 1), key=lambda n: abs(best_of_n_kl(n) - kl))
        set_seed(self.seed)
        tokenizer = load_tokenizer(self.model("sft"))
        sampler = BestOfNSampler(
            load_model(AutoModelForCausalLM, self.model("sft")), tokenizer, self.reward_source(), None, sample_size=n
        )
        prompts = list(base)
        completions = []
        for start in range(0, len(prompts), QUERIES):
            queries = tokenizer(prompts[start : start + QUERIES]).input_ids
            candidates = sampler.candidates(queries, do_sample=True, top_k=0, **self.generation)
            completions += [responses.completions[0] for responses in candidates]
        scores = judge(prompts, completions)
        differences = [score - other for score, other in zip(scores, base.values(), strict=True)]
        wins, ties = sum(d > 0 for d in differences), sum(d == 0 for d in differences)
        return {
            "n": n,
            "win_rate": asdict(proportion_estimate(wins + ties / 2, len(differences))),
            "difference": asdict(mean_estimate(differences)),
            "kl": {"value": best_of_n_kl(n)},
            "rows": [
                {"prompt": prompt, "response": text, "score": score}
                for prompt, text, score in zip(prompts, completions, scores, strict=True)
            ],
        }

    def table(self, results: dict[str, Any]) -> str:
        """Returns the table at the end, in Markdown."""
        judged, reward = results["judged"], results["reward"]
        lines = [
            f"Texts: {results['data']['source']}. Reward model: {reward['accuracy']:.1%} of {reward['pairs']} held-out pairs right "
            f"[{reward['interval']['low']:.1%}, {reward['interval']['high']:.1%}].",
            "",
            "| against the SFT model | win rate | judge's score, difference | KL, nats per response |",
            "| --- | --- | --- | --- |",
        ]
        names = {
            "ppo": "PPO",
            "dpo": f"DPO, step {judged['dpo']['step']}",
            "best_of_n": f"best of {judged['best_of_n']['n']}",
        }
        for key, name in names.items():
            row = judged[key]
            kl = interval(row["kl"], ".2f") if "low" in row["kl"] else f"≤ {row['kl']['value']:.2f}"
            lines.append(
                f"| {name} | {interval(row['win_rate'], '.1%')} | {interval(row['difference'], '+.2f')} | {kl} |"
            )
        return "\n".join(lines) + "\n"

    def ppo_trainer(self, folder: str) -> PPOTrainer:
        """Returns a trainer of a policy whose reference is the SFT model."""
        set_seed(self.seed)  # of the value head
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        reference = AutoModelForCausalLMWithValueHead.from_pretrained(self.model("sft"))
        return PPOTrainer(self.ppo_config, model, reference, load_tokenizer(self.model("sft")))

    def reward_source(self) -> ClassifierReward:
        """Returns the reward model."""
        return ClassifierReward.from_pretrained(self.model("reward"), label=0)


def named(model: str) -> str:
    """Returns the folder of a bundled model; any other folder or hub id as it is."""
    return assets.path(model) if model in BUNDLED else model  # type: ignore[arg-type]


def interval(estimate: dict[str, float], form: str) -> str:
    """Returns an estimate with its interval."""
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
