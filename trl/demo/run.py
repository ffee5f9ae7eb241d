"""The training run: PPO of a film-review language model against a sentiment classifier."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import trl.assets
from trl.core import set_seed
from trl.demo.outcome import TASK, DemoSettings, HeldOut, Review
from trl.models import AutoModelForCausalLMWithValueHead, create_reference_model
from trl.rewards import ClassifierReward, RewardMix, as_reward
from trl.runs.options import TrainResult
from trl.trainer import PPOConfig, PPOTrainer

HELD_OUT = 64  # number of prompts held out from training
DRAWS = 4  # responses to each held-out prompt in an evaluation; one alone moves the mean probability by some 0.02


def split_prompts() -> tuple[list[str], list[str]]:
    """Returns the training and the held-out prompts; the split is the same for every seed."""
    prompts = trl.assets.prompts()
    random.Random(0).shuffle(prompts)
    return prompts[HELD_OUT:], prompts[:HELD_OUT]


def log_odds(probability: float, bound: float) -> float:
    """Returns log(p / (1 - p)), clipped to ± `bound`."""
    if probability in (0.0, 1.0):
        return math.copysign(bound, probability - 0.5)
    return max(-bound, min(bound, math.log(probability / (1 - probability))))


def distinct_pairs(texts: Sequence[str]) -> float:
    """Returns distinct-2: distinct word bigrams as a fraction of all word bigrams in the texts."""
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


class Demo:
    """Holds the models, trainer and classifier of one run."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        set_seed(settings.seed)  # before the value head is randomly initialized
        self.training, self.held_out = split_prompts()
        self._judged: tuple[Any, list[float]] | None = None  # the last batch, which both rewards ask for
        folder = trl.assets.path("tiny-gpt2-reviews")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        config = PPOConfig(
            task_name=TASK,
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            mini_batch_size=settings.batch_size // settings.minibatches,
            ppo_epochs=settings.epochs,
            init_kl_coef=settings.kl_coef,
            target=settings.kl_target,
            horizon=settings.kl_horizon,
            vf_coef=settings.vf_coef,
            temperature=settings.temperature,
            cliprange_value=settings.cliprange_value,
            lam=settings.lam,
            max_grad_norm=1.0,
        )
        self.trainer = PPOTrainer(
            config,
            model,
            create_reference_model(model, num_shared_layers=settings.shared_layers or None),
            self.tokenizer,
        )
        self.judge = ClassifierReward.from_pretrained(
            trl.assets.path("tiny-bert-sentiment"), output="probability", device=self.trainer.current_device
        )

    def respond(self, queries: list[Tensor]) -> list[Tensor]:
        """Samples one response per query."""
        responses = self.trainer.generate(
            queries,
            batch_size=len(queries),
            return_prompt=False,
            max_new_tokens=self.settings.new_tokens,
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
        )
        assert isinstance(responses, list)
        return responses

    def texts(self, tokens: Sequence[Tensor]) -> list[str]:
        """Decodes each row of tokens, without special tokens."""
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]

    def train(self, run_dir: Path | None = None, *, progress: bool | None = None) -> TrainResult:
        """Trains, keeping the records in a run directory."""
        settings = self.settings
        return self.trainer.train(
            self.training,
            reward=RewardMix(
                {"log_odds": as_reward(self.log_odds), "positive": as_reward(self.positive)},
                weights={"log_odds": 1.0, "positive": 0.0},  # the second is shown, not learnt from
            ),
            steps=settings.steps,
            run_dir=run_dir,
            eval_prompts=self.held_out,
            eval_every=max(2, settings.steps // 4),
            generation={"max_new_tokens": settings.new_tokens, "batch_size": settings.batch_size},
            progress=progress,
        )

    def positive(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """P(POSITIVE) of each review."""
        texts = (tuple(prompts), tuple(completions))
        if self._judged is None or self._judged[0] != texts:
            self._judged = (texts, self.judge(prompts, completions))
        return self._judged[1]

    def log_odds(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """The score: clipped log-odds of POSITIVE."""
        return [log_odds(p, self.settings.score_clip) for p in self.positive(prompts, completions)]

    @torch.no_grad()
    def evaluate(self) -> HeldOut:
        """Evaluates `DRAWS` responses to each held-out prompt with a fixed seed; torch's random state is unchanged."""
        trainer = self.trainer
        prompts = self.held_out * DRAWS
        queries = [torch.tensor(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            responses = self.respond(queries)
        texts = self.texts(responses)
        probabilities = self.judge(prompts, texts)
        assert trainer.ref_model is not None
        inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, _, _, masks = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        ref_logprobs, _, _, _ = trainer.batched_forward_pass(trainer.ref_model, queries, responses, inputs)
        response_mask = masks.bool()
        kl = (logprobs - ref_logprobs).masked_fill(~response_mask, 0.0).sum(dim=1)  # [B]
        mean_nll = -ref_logprobs.masked_fill(~response_mask, 0.0).sum() / response_mask.sum()
        return HeldOut(
            reviews=[
                Review(prompt=prompt, response=text, positive=p)
                for prompt, text, p in zip(prompts, texts, probabilities, strict=True)
            ],
            positive=sum(probabilities) / len(probabilities),
            kl=kl.mean().item(),
            perplexity=mean_nll.exp().item(),
            distinct_2=distinct_pairs(texts),
        )
