"""`PPOTrainer.step` against numbers computed by the released TRL 0.4.6 (tests/parity/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.helpers import assert_close, tiny_tokenizer
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from trl.core import (
    entropy_from_logits,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    whiten,
)

pytestmark = pytest.mark.parity

DATA = Path(__file__).parent / "data"
CASES = sorted(path.parent.name for path in DATA.glob("*/case.json"))
PER_TOKEN = ("objective/logprobs", "objective/ref_logprobs")
FLATTENED = ("ppo/policy/advantages", "ppo/policy/ratio")


def build(case: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The value-head model of a case, dropout off, with `weights`."""
    settings = dict(case["model_config"])
    for name in ("transformers_version", "torch_dtype"):
        settings.pop(name, None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if case["architecture"] == "t5":
        plain = AutoModelForSeq2SeqLM.from_config(config)
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(plain, summary_dropout_prob=0.0)
    else:
        plain = AutoModelForCausalLM.from_config(config)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(plain, summary_dropout_prob=0.0)
    model.eval()
    load(model, weights)
    return model


def load(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copies every tensor of a 0.4.6 state dict into the model; none may be left over but constant buffers."""
    head = {k.removeprefix("v_head."): v for k, v in weights.items() if k.startswith("v_head.")}
    trunk = {k.removeprefix("pretrained_model."): v for k, v in weights.items() if not k.startswith("v_head.")}
    model.v_head.load_state_dict(head)
    result = model.pretrained_model.load_state_dict(trunk, strict=False)
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    assert [k for k in result.unexpected_keys if not k.endswith(buffers)] == []
    tied = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    assert [k for k in result.missing_keys if k not in tied] == []


def masks_of(case: dict[str, Any], step: dict[str, Any], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] bool: real predictions, and those that 0.4.6 counts; by lengths alone."""
    real = torch.zeros(len(step["queries"]), width, dtype=torch.bool)
    counted = torch.zeros_like(real)
    for row, (query, response) in enumerate(zip(step["queries"], step["responses"], strict=True)):
        if case["architecture"] == "t5":
            real[row, : len(response) - 1] = True
            counted[row, 1 : len(response) - 1] = True
        else:
            real[row, : len(query) + len(response) - 1] = True
            counted[row, len(query) - 1 : len(query) + len(response) - 1] = True
    return real, counted


@pytest.mark.parametrize("name", CASES)
def test_step_gives_the_numbers_of_trl_0_4_6(name: str) -> None:
    case = json.loads((DATA / name / "case.json").read_text())
    model = build(case, load_file(DATA / name / "policy_before.safetensors"))
    reference = None
    if case["num_shared_layers"] is None:
        reference = build(case, load_file(DATA / name / "reference.safetensors"))
        reference.requires_grad_(False)
    else:
        reference = create_reference_model(model, num_shared_layers=case["num_shared_layers"])
        load(reference, load_file(DATA / name / "reference.safetensors"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(case["trainable"])
    config = PPOConfig(**case["ppo_config"])
    trainer = PPOTrainer(config, model, reference, tiny_tokenizer())
    for step in case["steps"]:
        queries = [torch.tensor(q) for q in step["queries"]]
        responses = [torch.tensor(r) for r in step["responses"]]
        extras = {}
        if case["architecture"] == "t5":
            # 0.4.6 never trained the first generated token; the start token before it is no action either way.
            extras["response_masks"] = [torch.tensor([0, 0] + [1] * (len(r) - 2)) for r in responses]
        stats = trainer.step(queries, responses, [torch.tensor(s) for s in step["scores"]], **extras)
        compare(case, step, stats)
        assert_close(trainer.kl_ctl.value, step["kl_coef_after"])
    after = load_file(DATA / name / "policy_after.safetensors")
    compare_weights(case, trainer, after)


def compare(case: dict[str, Any], step: dict[str, Any], stats: dict[str, Any]) -> None:
    """Every statistic of 0.4.6: per-token ones where they mean something, all others whole."""
    expected = step["stats"]
    assert set(expected) <= set(stats)
    real, counted = masks_of(case, step, len(expected["objective/logprobs"][0]))
    for key, value in expected.items():
        if key in PER_TOKEN:
            assert_close(torch.as_tensor(stats[key])[real], torch.tensor(value)[real])
        elif key not in FLATTENED:
            assert_close(torch.as_tensor(np.asarray(stats[key])).float(), torch.tensor(value).float())
    ours, theirs = (
        [torch.as_tensor(np.asarray(source[key])).float().reshape(-1, *counted.shape) for key in FLATTENED]
        for source in (stats, expected)
    )
    for p in range(len(ours[0])):
        compare_rows([x[p] for x in ours], [x[p] for x in theirs], counted)
    assert ours[0].shape == theirs[0].shape


def compare_rows(ours: list[torch.Tensor], theirs: list[torch.Tensor], counted: torch.Tensor) -> None:
    """Advantages and ratios [B, S] of one pass. Each pass has its own order of rows, so that rows are paired first."""
    left = list(range(len(counted)))
    masks = []
    for advantages, ratio in zip(*ours, strict=True):
        mask = advantages != 0  # ours are 0 off the mask
        masks.append(tuple(mask.tolist()))
        gaps = [(theirs[0][row][mask] - advantages[mask]).abs().max().item() for row in left]
        row = left.pop(int(np.argmin(gaps)))
        assert_close(advantages[mask], theirs[0][row][mask])
        assert_close(ratio[mask], theirs[1][row][mask])
    assert sorted(masks) == sorted(tuple(row) for row in counted.tolist())


def compare_weights(case: dict[str, Any], trainer: PPOTrainer, after: dict[str, torch.Tensor]) -> None:
    state = {k.removeprefix("pretrained_model."): v for k, v in trainer.model.state_dict().items()}
    compared = 0
    for key, expected in after.items():
        key = key.removeprefix("pretrained_model.")
        if key not in state or key.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq")):
            continue
        actual = state[key]
        if key.endswith("c_attn.bias"):
            # The key's bias has an analytically zero gradient, and Adam turns its rounding noise into steps of the
            # learning rate: query and value alone are compared.
            n = len(expected) // 3
            keep = torch.cat([torch.arange(n), torch.arange(2 * n, 3 * n)])
            actual, expected = actual[keep], expected[keep]
        assert_close(actual, expected)
        compared += 1
    assert compared >= len(case["trainable"])


def test_functions_give_the_numbers_of_trl_0_4_6() -> None:
    data = load_file(DATA / "functions.safetensors")
    x, mask = data["x"], data["mask"]
    assert_close(masked_mean(x, mask), data["masked_mean"].squeeze())
    assert_close(masked_mean(x, mask, axis=1), data["masked_mean_axis1"])
    assert_close(masked_var(x, mask), data["masked_var"].squeeze())
    assert_close(masked_var(x, mask, unbiased=False), data["masked_var_biased"].squeeze())
    assert_close(masked_whiten(x, mask)[mask.bool()], data["masked_whiten"][mask.bool()])
    kept = masked_whiten(x, mask, shift_mean=False)
    assert_close(kept[mask.bool()], data["masked_whiten_keep_mean"][mask.bool()])
    assert_close(whiten(x), data["whiten"])
    assert_close(logprobs_from_logits(data["logits"], data["labels"]), data["logprobs"])
    assert_close(entropy_from_logits(data["logits"]), data["entropy"])
