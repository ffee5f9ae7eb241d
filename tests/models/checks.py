"""What every architecture must pass; tests/models/test_architectures.py and scripts/architecture_table.py run them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tests.helpers import PAD, assert_close, tiny_tokenizer
from tests.models.rollouts import make_rollout, pad
from tests.models.zoo import VOCABULARY, Architecture
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, evaluate
from trl.types import Evaluation


class Subject:
    """An architecture, its value-head model, and what it says about a padded rollout."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.seq2seq = architecture.encoder_decoder
        self.auto = AutoModelForSeq2SeqLMWithValueHead if self.seq2seq else AutoModelForCausalLMWithValueHead

    def build(self) -> Any:
        """A fresh value-head model."""
        return self.auto.from_pretrained(self.architecture.build(), summary_dropout_prob=0.0).eval()

    @cached_property
    def model(self) -> Any:
        """A value-head model that no check changes."""
        return self.build()

    def says(self, model: Any, side: str) -> Evaluation:
        """Numbers of the response tokens, row after row; they do not depend on where padding stands."""
        rollout = make_rollout(side, seq2seq=self.seq2seq)
        with torch.no_grad():
            got = evaluate(model, rollout)
        values = None if got.values is None else got.values[rollout.mask]
        return Evaluation(logprobs=got.logprobs[rollout.mask], values=values, entropy=None)


def forward(subject: Subject) -> None:
    """Logits, loss and values, and finite gradients of all three with padding on the left."""
    model = subject.build().train()
    rollout = make_rollout("left", seq2seq=subject.seq2seq)
    kwargs = {"input_ids": rollout.tokens, "attention_mask": rollout.attention.long()}
    if rollout.encoder_tokens is not None and rollout.encoder_attention is not None:
        kwargs |= {"decoder_input_ids": rollout.tokens, "decoder_attention_mask": rollout.attention.long()}
        kwargs |= {"input_ids": rollout.encoder_tokens, "attention_mask": rollout.encoder_attention.long()}
    logits, loss, values = model(**kwargs, labels=rollout.tokens)
    assert logits.shape == (*rollout.tokens.shape, VOCABULARY)
    assert values.shape == rollout.tokens.shape
    assert logits.dtype == values.dtype == torch.float32
    assert loss.dim() == 0
    got = evaluate(model, rollout, entropy=True, response_only=True)
    assert got.values is not None
    assert got.entropy is not None
    (got.logprobs + got.values + got.entropy)[rollout.mask].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["v_head.summary.weight"].any()
    assert any(gradient.any() for name, gradient in gradients.items() if "v_head" not in name)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


def generate(subject: Subject) -> None:
    """A batch of queries, padded on the left, gives what each query gives alone."""
    queries = [torch.tensor(row) for row in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]
    tokens, attention = pad(queries, "right" if subject.seq2seq else "left", extra=0)
    limits = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "max_length": None}
    together = subject.model.generate(input_ids=tokens, attention_mask=attention.long(), **limits)
    for i, query in enumerate(queries):
        alone = subject.model.generate(input_ids=query[None], attention_mask=torch.ones(1, len(query)).long(), **limits)
        assert torch.equal(together[i, -3:], alone[0, -3:])


def save_and_load(subject: Subject) -> None:
    """Every weight and the head come back; so do the numbers."""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        assert (Path(folder) / "v_head.safetensors").exists()
        loaded = subject.auto.from_pretrained(folder).eval()
    states = subject.model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert_close(states[1][name], tensor, 0)
    before, after = subject.says(subject.model, "right"), subject.says(loaded, "right")
    assert_close(after.logprobs, before.logprobs)
    assert_close(after.values, before.values)


def plain_transformers(subject: Subject) -> None:
    """The save is a language model of its own class to transformers: nothing missing, nothing left over."""
    import transformers

    cls = getattr(transformers, subject.architecture.model)
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        plain, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert_close(subject.says(plain.eval(), "right").logprobs, subject.says(subject.model, "right").logprobs)


def padding(subject: Subject) -> None:
    """Log-probabilities and values are the same with padding on the left and on the right, to 1e-4."""
    left, right = subject.says(subject.model, "left"), subject.says(subject.model, "right")
    assert_close(left.logprobs, right.logprobs, 1e-4)
    assert_close(left.values, right.values, 1e-4)


def ppo_step(subject: Subject) -> None:
    """`PPOTrainer.step` with a reference model: finite statistics, and the trunk and the head move."""
    from trl import PPOConfig, PPOTrainer

    model = subject.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = getattr(model.config, "decoder_start_token_id", None)
    responses = [torch.tensor(row) for row in ([14, 15, 16], [17, 1])]
    if subject.seq2seq:
        responses = [torch.cat([torch.tensor([PAD if start is None else start]), row]) for row in responses]
    trainer = PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-2),
        model,
        None,
        tiny_tokenizer(),
    )
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
    assert math.isfinite(float(stats["ppo/loss/total"]))
    assert abs(float(stats["objective/kl"])) < 1e-3  # the policy is still the reference
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "v_head.summary.weight" in moved
    assert len(moved) > len(before) // 2
    assert all(p.isfinite().all() for p in model.parameters())


CHECKS: dict[str, Callable[[Subject], None]] = {
    "forward": forward,
    "generate": generate,
    "save and load": save_and_load,
    "plain transformers": plain_transformers,
    "left = right padding": padding,
    "PPO step": ppo_step,
}
