"""Estimate of a run's cost, from the model's configuration alone: parameters, memory, tokens, optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trl.cli import building, reward_sources
from trl.cli.resolve import Resolved
from trl.data import load_prompts
from trl.models import create_reference_model
from trl.runs.options import TrainOptions

_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Numbers of a run; memory in bytes, without activations unless named so."""

    parameters: int
    trained: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int  # of one forward and backward pass
    prompts: int
    prompt_tokens: float  # mean
    tokens_per_step: int  # at most: prompts and responses of full length
    optimizer_steps: int  # per step
    steps: int
    samples: int

    @property
    def total(self) -> int:
        """Sum of the memory."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.activations


_PROCESS = 450  # MB of a process that has imported torch and transformers, on a CPU


def text(command: str, resolved: Resolved) -> str:
    """The estimate as text, with a remark where a setting is unusual."""
    found = estimate(command, resolved)
    batch, mini = resolved["ppo.batch_size"], resolved["ppo.mini_batch_size"]
    lines = [
        f"parameters      {found.parameters:,}, of which {found.trained:,} are trained",
        f"memory          about {size(found.total)}: weights {size(found.weights)}, reference {size(found.reference)}, "
        f"gradients {size(found.gradients)}, optimizer {size(found.optimizer)}, activations {size(found.activations)}; Python, torch and "
        f"transformers take about {_PROCESS} MB besides",
        f"prompts         {found.prompts:,}, {found.prompt_tokens:.0f} tokens on average",
        f"a step          {batch} samples, at most {found.tokens_per_step:,} tokens, {found.optimizer_steps} optimizer "
        "steps",
        f"the run         {found.steps:,} steps, {found.samples:,} samples, "
        f"{found.samples / resolved['ppo.group_size'] / found.prompts:.1f} passes over the prompts",
    ]
    if found.optimizer_steps > 64:
        lines.append(
            f"remark          {found.optimizer_steps} optimizer steps on one batch are many: mini_batch_size={mini} "
            f"samples each; {max(1, batch // 4)} would make {4 * resolved['ppo.ppo_epochs']}"
        )
    return "\n".join(lines)


def estimate(command: str, resolved: Resolved) -> Estimate:
    """Estimates a run without loading weights, and reads every prompt as the run would.

    Memory counts float32 weights, gradients and Adam's two moments. Activations follow Korthikanti et al. 2022
    (arXiv:2205.05198): 34 bytes per token, layer and hidden unit at two bytes a number, without the attention matrices,
    which fused attention does not keep; and the logits of one minibatch.
    """
    ppo = resolved.section("ppo")
    config = building.model_config(resolved)
    policy, reference = _without_weights(command, resolved)
    width = int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 0)
    layers = int(getattr(config, "num_hidden_layers", None) or 0)
    own = {id(p) for p in policy.parameters()}
    trained = count(p for p in policy.parameters() if p.requires_grad)
    source, held_out = building.prompts(resolved)
    tokenizer = building.tokenizer(resolved)
    prompts = load_prompts(source, tokenizer)
    reward_sources.check_columns(resolved, list(prompts[0].columns))
    if held_out is not None:
        load_prompts(held_out, tokenizer)  # an error names the row
    lengths = [len(prompt.tokens) for prompt in prompts]
    response = resolved["generation.max_new_tokens"]
    steps = TrainOptions(
        prompts=source,
        reward=None,
        eval_prompts=held_out,
        steps=resolved["train.steps"],
        episodes=resolved["train.episodes"],
    ).target(int(ppo.batch_size or 1))
    micro = int(ppo.mini_batch_size or 1) * (max(lengths) + response)
    vocabulary = int(getattr(config, "vocab_size", None) or 0)
    moments = 2 if ppo.optimizer_state_dtype == "bfloat16" else 4
    per_token = 4 * width if ppo.gradient_checkpointing else 68 * width
    return Estimate(
        parameters=count(policy.parameters()),
        trained=trained,
        weights=4 * count(policy.parameters()),
        reference=0 if reference is None else 4 * count(p for p in reference.parameters() if id(p) not in own),
        gradients=4 * trained,
        optimizer=2 * moments * trained,
        activations=micro * (layers * per_token + 4 * vocabulary),
        prompts=len(prompts),
        prompt_tokens=sum(lengths) / len(lengths),
        tokens_per_step=math.ceil(int(ppo.batch_size or 1) * (sum(lengths) / len(lengths) + response)),
        optimizer_steps=int(ppo.ppo_epochs or 1) * int(ppo.batch_size or 1) // ppo.samples_per_update,
        steps=steps,
        samples=steps * int(ppo.batch_size or 1),
    )


def _without_weights(command: str, resolved: Resolved) -> tuple[Any, Any]:
    """The trainer's policy and reference on the meta device; None for a reference that shares the policy."""
    settings, adapter = resolved.section("model"), resolved.section("lora")
    with torch.device("meta"):
        policy = building.wrapped(resolved, _empty(resolved, "model.name"), new_adapter=adapter.r is not None)
        if command != "ppo":
            policy.v_head.requires_grad_(False)
            if not resolved["grpo.kl_coef"]:
                return policy, None
        if settings.reference is not None:
            return policy, building.wrapped(resolved, _empty(resolved, "model.reference"), new_adapter=False)
        if adapter.r is not None:
            return policy, None  # the policy without its adapter
        return policy, create_reference_model(policy, num_shared_layers=settings.shared_layers)


def _empty(resolved: Resolved, setting: str) -> Any:
    config = building.model_config(resolved, setting)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return auto_class.from_config(config, trust_remote_code=resolved["model.trust_remote_code"])


def count(parameters: Iterable[Any]) -> int:
    """Numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters)


def size(number: float) -> str:
    """Bytes in MB or GB."""
    return f"{number / _MEBIBYTE / 1024:.1f} GB" if number >= 1024 * _MEBIBYTE else f"{number / _MEBIBYTE:.0f} MB"
