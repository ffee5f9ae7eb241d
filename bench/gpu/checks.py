"""Checks of the library on a GPU, one after the other; each is a line of results.json, written as soon as it is known.

"as predicted" in a line: the review says that this fails today. Exit 75: the device is in a bad state, start this again
(what is done is not done again). Without a GPU everything runs on the CPU: a test of this program, not of the library.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, Results, clean, describe_machine, left, say, tokenizer, where

R = Results("checks")
PATIENCE = float(os.environ.get("GPU_CHECK_PATIENCE", 1))  # times the seconds of a check, on a slow machine
CHECKS: list[tuple[str, int, str, Callable[[], Any]]] = []


def check(seconds: int, predicted: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(work: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append((work.__name__, seconds, predicted, work))
        return work

    return add


# Small models and batches ---------------------------------------------------------------------------------------------


def small(kind: str = "llama", seed: int = 0, **settings: Any) -> Any:
    import transformers as tf

    words = settings.pop("vocab_size", 61)
    special = dict(vocab_size=words, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    body = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=512)  # fmt: skip
    torch.manual_seed(seed)
    if kind == "gpt2":
        off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(**(special | off | dict(n_layer=3, n_head=4, n_embd=64, n_positions=512) | settings))
        ).eval()
    if kind == "t5":
        t5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
        return tf.T5ForConditionalGeneration(tf.T5Config(**(special | {"bos_token_id": None} | t5 | settings))).eval()
    make, config = {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig), "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
        "mistral": (tf.MistralForCausalLM, tf.MistralConfig),
    }[kind]  # fmt: skip
    return make(config(**(special | body | settings))).eval()


def fresh_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make(
    kind: str = "llama",
    cpu: bool = False,
    lora: bool = False,
    seed: int = 0,
    model: dict | None = None,
    dropout: float = 0.0,
    **config: Any,
) -> Any:
    """A trainer with a reference of its own; `dropout` before the value head, which a fresh wrapper has on."""
    from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

    fresh_accelerate()
    options: dict[str, Any] = {"summary_dropout_prob": dropout}
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
    plain = small(kind, seed, **(model or {}))
    torch.manual_seed(seed)
    wrapper = (
        AutoModelForSeq2SeqLMWithValueHead if kind == "t5" else AutoModelForCausalLMWithValueHead
    ).from_pretrained(plain, **options)
    settings = dict(
        batch_size=8, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-3, dtype="float32", init_kl_coef=0.1
    )
    extra = dict(config.pop("accelerator_kwargs", {}))
    if cpu:
        extra["cpu"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(PPOConfig(**(settings | dict(accelerator_kwargs=extra) | config)), wrapper, None, tokenizer())


def batch(
    seed: int = 1, count: int = 8, kind: str = "llama", words: int = 61, query: int = 9, new: int = 17
) -> tuple[list, list, list]:
    g = torch.Generator().manual_seed(seed)
    queries = [torch.randint(3, words, (query - i % 4,), generator=g) for i in range(count)]
    responses = [torch.randint(3, words, (new - i % 7,), generator=g) for i in range(count)]
    if kind == "t5":
        responses = [torch.cat([torch.zeros(1, dtype=torch.int64), r]) for r in responses]
    return queries, responses, [torch.tensor(float(i % 3) - 1) for i in range(count)]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().float().cpu().clone() for name, p in model.named_parameters()}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference, and it is relative to how far weights are apart from zero."""
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-6)) for n in b)


PLAIN = dict(return_prompt=False, batch_size=8, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
NUMBERS = (
    "objective/kl",
    "objective/entropy",
    "ppo/loss/total",
    "ppo/policy/entropy",
    "ppo/returns/mean",
    "ppo/grad_norm",
)


def numbers(stats: dict[str, Any]) -> dict[str, float]:
    return {name: float(stats[name]) for name in NUMBERS}


# Checks ---------------------------------------------------------------------------------------------------------------


@check(60)
def everything_is_on_the_device() -> dict:
    """A model made on the CPU, queries on the CPU: the trainer moves what it needs."""
    trainer = make(dtype="bfloat16")
    queries, _, scores = batch()
    responses = trainer.generate(queries, max_new_tokens=8, **PLAIN)
    trainer.step(queries, responses, scores)
    places = Counter(p.device.type for p in trainer.model.parameters()) + Counter(
        p.device.type for p in trainer.ref_model.parameters()
    )
    states = Counter(
        str(t.device) for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    )
    assert set(places) == {DEVICE} and {r.device.type for r in responses} == {DEVICE}, (places, responses[0].device)
    return dict(parameters=dict(places), optimizer=dict(states), reference=str(next(trainer.ref_model.parameters()).dtype),
                passes=str(trainer._trl_compute.dtype), current_device=str(trainer.current_device))  # fmt: skip


def _what_models_can(kind: str, precision: str = "highest") -> dict:
    from trl.models import abilities
    from trl.rollout.self_check import _decoding_error, fixed_steps_obstacle, obstacle

    torch.set_float32_matmul_precision(precision)
    model = small(kind).to(DEVICE)
    able = abilities(model)
    found = dict(
        engine=obstacle(model),
        error=_decoding_error(model, fixed_steps=False),
        graph=fixed_steps_obstacle(model),
        projects=able.projects,
        packs=able.packs,
        packs_in_bfloat16=abilities(model.bfloat16()).packs,
    )
    if found["graph"] is None:
        found["graph_error"] = _decoding_error(model, fixed_steps=True)
    return found


@check(30)
def what_models_can() -> dict:
    found = {kind: _what_models_can(kind) for kind in ("gpt2", "llama", "qwen2", "mistral", "t5")}
    assert all(f["engine"] is None and f["projects"] for f in found.values()), found
    if DEVICE == "cuda":
        able = [kind for kind, f in found.items() if f["graph"] is None and f["packs_in_bfloat16"]]
        assert {"llama", "qwen2"} <= set(able), found
    return found


@check(20)
def what_models_can_with_tf32() -> dict:
    found = {kind: _what_models_can(kind, "high") for kind in ("gpt2", "llama", "qwen2")}
    assert all(f["engine"] is None for f in found.values()), found
    return found


@check(60)
def a_step_in_float32_is_the_cpus() -> dict:
    """Two steps on the CPU and on the device from the same weights, tokens and scores."""
    found = {}
    for kind in ("llama", "gpt2", "t5"):
        seen = {}
        for cpu in (True, False):
            trainer = make(kind, cpu=cpu, max_grad_norm=1.0)
            stats = [numbers(trainer.step(*batch(seed, kind=kind))) for seed in (1, 2)]
            seen[cpu] = stats, weights(trainer)
        apart = max(
            abs(a[n] - b[n]) / (1 + abs(b[n]))
            for a, b in zip(seen[False][0], seen[True][0], strict=True)
            for n in NUMBERS
        )
        found[kind] = dict(statistics=apart, weights=gap(seen[False][1], seen[True][1]))
    assert all(f["statistics"] < 1e-3 for f in found.values()), found
    return found


@check(30)
def the_same_tokens_as_the_cpu() -> dict:
    """One seed, float32: the same responses but for draws at the edge of a word."""
    found = {}
    for kind in ("llama", "gpt2"):
        seen = []
        for cpu in (True, False):
            trainer = make(kind, cpu=cpu)
            torch.manual_seed(5)
            seen.append([r.cpu() for r in trainer.generate(batch()[0], max_new_tokens=24, **PLAIN)])
        found[kind] = sum(torch.equal(a, b) for a, b in zip(*seen, strict=True)) / len(seen[0])
    assert all(share >= 0.8 for share in found.values()), found
    return found


def _sampled_and_scored(dtype: str, kind: str = "qwen2", words: int = 61) -> list[dict]:
    """How far a scoring pass is from the log-probabilities of the engine's own draws: of fresh weights, then of updated ones."""
    from trl.models import evaluate

    trainer = make(kind, dtype=dtype, model=dict(vocab_size=words), learning_rate=1e-2)
    queries, responses, scores = batch(words=words)
    queries = [q.to(trainer.current_device) for q in queries]
    found = []
    for last in (False, True):
        rollout = trainer._trl_sampler.sample(
            trainer.model, queries, {k: v for k, v in PLAIN.items() if k not in ("return_prompt", "batch_size")} | {"max_new_tokens": 40},
            length_sampler=None, batch_size=8, temperature=1.0, cache=False,
        )  # fmt: skip
        assert rollout.sampler_logprobs is not None, "transformers' generate sampled: see what_models_can"
        mask = rollout.mask.to(trainer.current_device)
        with trainer._trl_evaluator().evaluating():
            scored = evaluate(trainer.model, rollout).logprobs
        apart = (scored - rollout.sampler_logprobs.to(scored.device))[mask].abs()
        found.append(dict(mean=apart.mean().item(), largest=apart.max().item()))
        if not last:
            before = weights(trainer)
            trainer.step(queries, responses, scores)
            found[0]["weights_moved"] = gap(weights(trainer), before)
    return found


@check(40)
def sampling_and_scoring_agree() -> dict:
    """Before and after an update, queries of different lengths: a decoding step that kept old weights would show here."""
    found = {dtype: _sampled_and_scored(dtype) for dtype in ("float32", "bfloat16")}
    found["bfloat16, 50k words"] = _sampled_and_scored("bfloat16", words=50000)
    assert max(f["largest"] for f in found["float32"]) < 1e-3 and max(f["mean"] for f in found["bfloat16"]) < 0.05, (
        found
    )
    return found


@check(30)
def sampling_together_is_sampling_alone() -> dict:
    """The same random numbers give a row the same tokens in a padded batch and alone (float32)."""
    from trl.rollout.local import sample
    from trl.types import Sampling

    model = small("qwen2").to(DEVICE)
    queries = batch()[0]
    uniforms = torch.rand(24, len(queries), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = sample(model, queries, sampling=Sampling(), limits=[24] * len(queries), uniforms=uniforms).responses
    same = 0
    for i, query in enumerate(queries):
        alone = sample(model, [query], sampling=Sampling(), limits=[24], uniforms=uniforms[:, i : i + 1]).responses[0]
        same += torch.equal(alone, together[i])
    assert same >= len(queries) - 1, same
    return dict(same=same, of=len(queries))


@check(40)
def steps_of_fixed_shapes_sample_the_same() -> dict:
    """A CUDA graph against the growing cache: the same random numbers, rows that end at different tokens, weights that change."""
    from trl.rollout.local import sample
    from trl.types import Sampling

    found: dict[str, Any] = {}
    for kind in ("llama", "qwen2"):
        model = small(kind).to(DEVICE)
        queries, limits = batch()[0], [40 - 3 * i for i in range(8)]
        uniforms = torch.rand(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for when in ("fresh", "changed"):
            ends = [
                sample(
                    model, queries, sampling=Sampling(stops=(1,)), limits=limits, uniforms=uniforms, fixed_steps=fixed
                )
                for fixed in (False, True)
            ]
            same = [torch.equal(a, b) for a, b in zip(*(end.responses for end in ends), strict=True)]
            apart = [
                (a - b).abs().max().item() for a, b, ok in zip(*(end.logprobs for end in ends), same, strict=True) if ok
            ]
            found[f"{kind}, {when}"] = dict(same=sum(same), logprobs_apart=max(apart, default=None))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
    assert all(f["same"] >= 7 and f["logprobs_apart"] < 1e-3 for f in found.values()), found
    return found


@check(30)
def bfloat16_steps() -> dict:
    """Narrow passes on float32 weights: finite, the weights move, and much the same way as in float32."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make(
            "llama", dtype=dtype, ppo_epochs=1, mini_batch_size=8, learning_rate=1e-3, model=dict(hidden_size=128)
        )
        before = weights(trainer)
        stats = trainer.step(*batch())
        after = weights(trainer)
        moved[dtype] = torch.cat([(after[n] - before[n]).flatten() for n in before]), numbers(stats)
    cosine = torch.nn.functional.cosine_similarity(moved["float32"][0], moved["bfloat16"][0], dim=0).item()
    assert cosine > 0.5, cosine
    return dict(cosine_of_updates=cosine, float32=moved["float32"][1], bfloat16=moved["bfloat16"][1])


@check(30)
def microbatches_change_nothing() -> dict:
    found = []
    for mini, pieces in ((8, 1), (4, 2), (2, 4)):
        trainer = make(mini_batch_size=mini, gradient_accumulation_steps=pieces, ppo_epochs=1, max_grad_norm=1.0)
        found.append((numbers(trainer.step(*batch())), weights(trainer)))
    worst = max(abs(f[0]["ppo/grad_norm"] - found[0][0]["ppo/grad_norm"]) / found[0][0]["ppo/grad_norm"] for f in found)
    assert worst < 1e-4, worst
    return dict(grad_norm_apart=worst)


@check(40)
def lora_works() -> dict:
    trainer = make("llama", lora=True, dtype="bfloat16")
    queries, _, scores = batch()
    before = weights(trainer)
    responses = trainer.generate(queries, max_new_tokens=12, **PLAIN)
    stats = trainer.step(queries, responses, scores)
    after = weights(trainer)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all("lora_" in n or "v_head" in n for n in changed), changed
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(folder)
        other = make("llama", lora=True, dtype="bfloat16")
        other.load_checkpoint(folder)
        assert gap(weights(other), weights(trainer)) == 0
    dtypes = Counter(str(p.dtype) for p in trainer.model.parameters())
    return dict(numbers(stats), dtypes=dict(dtypes), first_kl=float(stats["objective/kl"]))


@check(30)
def an_encoder_decoder_works() -> dict:
    trainer = make("t5", dtype="bfloat16")
    queries, _, scores = batch(kind="t5")
    responses = trainer.generate(queries, max_new_tokens=10, **PLAIN)
    return numbers(trainer.step(queries, responses, scores))


def _run(dtype: str, steps: int, trainer: Any = None, kind: str = "llama", **settings: Any) -> tuple[Any, list[dict]]:
    trainer = trainer or make(kind, dtype=dtype, max_grad_norm=1.0, dropout=0.1, **settings)
    rows = []
    for _ in range(steps):
        g = torch.Generator().manual_seed(100 + trainer._trl_steps_done)
        queries = [torch.randint(3, 61, (9 - i % 4,), generator=g) for i in range(8)]
        responses = trainer.generate(queries, max_new_tokens=12, **PLAIN)
        rows.append(
            numbers(trainer.step(queries, responses, [torch.tensor(float(len(set(r.tolist())))) for r in responses]))
        )
    return trainer, rows


def _resumed(dtype: str, **settings: Any) -> dict:
    from trl.training.resume import capture

    with tempfile.TemporaryDirectory() as folder:
        straight, first = _run(dtype, 1, **settings)
        straight.save_checkpoint(folder)
        _, rest = _run(dtype, 2, straight)
        fresh = make(dtype=dtype, max_grad_norm=1.0, dropout=0.1, **settings)
        fresh.load_checkpoint(folder)
        _, again = _run(dtype, 2, fresh)
    one, other = capture(straight)[0], capture(fresh)[0]
    same = {file: sum(torch.equal(one[file][n], other[file][n]) for n in one[file]) / len(one[file]) for file in one}
    return dict(tensors_equal=same, statistics_equal=rest == again)


@check(60)
def a_resumed_run_is_the_same_to_the_bit_without_asking() -> dict:
    found = {dtype: _resumed(dtype) for dtype in ("float32", "bfloat16")}
    found["bfloat16 moments"] = _resumed("bfloat16", optimizer_state_dtype="bfloat16")
    assert all(f["statistics_equal"] for f in found.values()), found
    return found


@check(40)
def a_resumed_run_is_the_same_with_deterministic_algorithms() -> dict:
    torch.use_deterministic_algorithms(True)
    return {dtype: _resumed(dtype) for dtype in ("float32", "bfloat16")}


@check(40)
def what_is_not_deterministic() -> dict:
    """Operations that torch warns of, by name."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _resumed("bfloat16")
    return dict(Counter(str(w.message).split(" does not")[0][:80] for w in seen if "determin" in str(w.message)))


@check(40)
def the_same_run_twice() -> dict:
    """At a size at which kernels split their sums: does a run repeat itself if nobody asks for determinism?"""
    ends = []
    for _ in range(2):
        size = dict(hidden_size=256, intermediate_size=512, vocab_size=8192) if DEVICE == "cuda" else {}
        trainer = make("qwen2", dtype="bfloat16", model=size)
        trainer.step(*batch(words=61, query=60, new=200 if DEVICE == "cuda" else 40))
        ends.append(weights(trainer))
    return dict(equal=all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]), apart=gap(*ends))


@check(30)
def gradient_checkpointing_gives_the_same() -> dict:
    ends = []
    for flag in (False, True):
        trainer = make("llama", dtype="bfloat16", gradient_checkpointing=flag)
        ends.append((numbers(trainer.step(*batch())), weights(trainer)))
    apart = gap(ends[0][1], ends[1][1])
    assert ends[0][0] == ends[1][0] or apart < 0.1, (ends[0][0], ends[1][0], apart)
    return dict(statistics_equal=ends[0][0] == ends[1][0], weights_apart=apart)


@check(40)
def exact_kl_shared_layers_and_recall() -> dict:
    """kl_penalty="full"; frozen first layers run once; log-probabilities taken from sampling."""
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    found = {"full": numbers(make(kl_penalty="full", dtype="bfloat16").step(*batch()))}
    fresh_accelerate()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(small("llama"))
    config = PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=2, dtype="bfloat16", learning_rate=1e-3)
    found["shared"] = numbers(PPOTrainer(config, model, None, tokenizer(), num_shared_layers=1).step(*batch()))
    trainer = make("llama", dtype="bfloat16", score_while_sampling=True)
    queries, _, scores = batch()
    responses = trainer.generate(queries, max_new_tokens=12, **PLAIN)
    found["recall"] = dict(
        numbers(trainer.step(queries, responses, scores)),
        recalled=not any("scoring pass" in line for line in trainer._trl_sampler._logged),
    )
    assert found["recall"]["recalled"], found
    return found


@check(60)
def out_of_memory_halves_the_microbatch() -> dict:
    """On a GPU a real one: torch is given only part of the memory that the whole microbatch takes."""
    shape = (
        dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=8192) if DEVICE == "cuda" else {}
    )
    settings = dict(dtype="bfloat16", batch_size=16, mini_batch_size=16, ppo_epochs=1, learning_rate=1e-4, model=shape)
    data = batch(count=16, query=64, new=400 if DEVICE == "cuda" else 12)

    def step(size: int, limit: float | None = None) -> tuple[int | None, float, float]:
        """The largest microbatch afterwards, the gradient's norm, and the peak of allocated memory."""
        clean()
        trainer = make("llama", **(settings | dict(mini_batch_size=size, gradient_accumulation_steps=16 // size)))
        if DEVICE == "cuda":
            clean()
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        norm = float(trainer.step(*data)["ppo/grad_norm"])
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0.0
        return trainer._trl_guards.largest_microbatch, norm, peak

    if DEVICE != "cuda":
        import trl.algorithms.ppo as ppo

        plain = ppo.evaluate

        def short(model: Any, rollout: Any, **options: Any) -> Any:
            if len(rollout) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
            return plain(model, rollout, **options)

        _, norm, _ = step(16)
        ppo.evaluate = short
        try:
            largest, halved, _ = step(16)
        finally:
            ppo.evaluate = plain
        assert largest == 4 and abs(halved / norm - 1) < 0.05, (largest, halved, norm)
        return dict(largest_microbatch=largest, norms=[norm, halved])
    _, norm, whole = step(16)
    _, _, part = step(4)
    limit = part + 0.75 * (whole - part)  # room for scoring, which is not guarded and takes less
    try:
        largest, halved, peak = step(16, limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = dict(
        whole_gb=whole / 1e9, quarter_gb=part / 1e9, limit_gb=limit / 1e9, peak_gb=peak / 1e9, largest_microbatch=largest, norms=[norm, halved]
    )  # fmt: skip
    assert largest is not None and abs(halved / norm - 1) < 0.05, found
    return found


@check(60)
def a_managed_run_resumes() -> dict:
    def reward(prompts: list, completions: list, **columns: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    prompts = [f"w{5 + i} w{6 + i} w{7 + i}" for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name, cuts in (("straight", (3,)), ("cut", (1, 3))):
            for steps in cuts:
                trainer = make("llama", dtype="bfloat16")
                result = trainer.train(prompts, reward=reward, steps=steps, run_dir=Path(folder) / name, resume="auto",
                                       progress=False, generation={"max_new_tokens": 12})  # fmt: skip
            rows[name] = {
                k: v
                for k, v in result.metrics.items()
                if isinstance(v, float) and not k.startswith(("time/", "memory/"))
            }
    differing = [
        k
        for k in rows["straight"]
        if rows["straight"][k] != rows["cut"].get(k) and rows["straight"][k] == rows["straight"][k]
    ]
    assert not differing, differing[:10]
    return dict(equal=True, numbers=len(rows["straight"]))


@check(30)
def gradients_that_are_not_finite_are_skipped() -> dict:
    trainer = make("llama", dtype="bfloat16")
    before = weights(trainer)
    with torch.no_grad():
        trainer.model.v_head.summary.weight[0, 0] = float("nan")
    stats = trainer.step(*batch())
    after = weights(trainer)
    same = all(torch.equal(before[n], after[n]) for n in before if "v_head" not in n)
    assert same and float(stats["ppo/skipped_updates"]) == 1.0
    return dict(skipped=float(stats["ppo/skipped_updates"]))


@check(40)
def accelerates_bfloat16_autocast() -> dict:
    trainer = make("llama", dtype="auto", accelerator_kwargs={"mixed_precision": "bf16"})
    queries, _, scores = batch()
    seen: list[str] = []
    handle = trainer.accelerator.unwrap_model(trainer.model).pretrained_model.lm_head.register_forward_hook(
        lambda module, args, out: seen.append(str(out.dtype))
    )
    responses = trainer.generate(queries, max_new_tokens=6, **PLAIN)
    handle.remove()
    stats = trainer.step(queries, responses, scores)
    return dict(numbers(stats), sampling_computes_in=dict(Counter(seen)))


@check(40)
def float16_with_a_scaler() -> dict:
    trainer = make("llama", dtype="auto", accelerator_kwargs={"mixed_precision": "fp16"})
    if trainer.accelerator.scaler is None:
        return dict(skipped="accelerate made no scaler here")
    trainer.accelerator.scaler._init_scale = 2.0**26  # overflows at once, as real models do at 2^16
    rows = [float(trainer.step(*batch(seed))["ppo/skipped_updates"]) for seed in range(4)]
    assert rows[0] > 0.0 and rows[-1] == 0.0, rows
    return dict(skipped=rows)


@check(30)
def under_a_default_device() -> dict:
    torch.set_default_device(DEVICE)
    trainer = make("llama", dtype="bfloat16")
    queries, _, scores = batch_on_cpu()
    responses = trainer.generate(queries, max_new_tokens=6, **PLAIN)
    return numbers(trainer.step(queries, responses, scores))


def batch_on_cpu() -> tuple[list, list, list]:
    with torch.device("cpu"):
        return batch()


@check(30)
def how_often_the_host_waits() -> dict:
    """Synchronising calls that torch counts, for a token of sampling and for a step of 4 optimizer steps, by place."""
    if DEVICE != "cuda":
        return dict(skipped="no GPU")
    trainer = make("qwen2", dtype="bfloat16")
    queries, _, scores = batch()
    queries = [q.to(DEVICE) for q in queries]

    def count(work: Callable[[], Any]) -> tuple[Any, Counter]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                found = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return found, Counter(f"{w.filename.split('site-packages/')[-1].split('/trl/')[-1]}:{w.lineno}" for w in seen)

    trainer.generate(queries, max_new_tokens=4, **PLAIN)
    _, few = count(lambda: trainer.generate(queries, max_new_tokens=8, **PLAIN))
    responses, many = count(lambda: trainer.generate(queries, max_new_tokens=24, **PLAIN))
    _, of_step = count(lambda: trainer.step(queries, responses, scores))
    grown = many - few
    return dict(per_token={k: v / 16 for k, v in grown.most_common(12)}, per_token_sum=sum(grown.values()) / 16,
                of_generate=dict(few.most_common(8)), of_step=dict(of_step.most_common(25)), of_step_sum=sum(of_step.values()))  # fmt: skip


@check(30)
def adam_on_the_device_is_torchs() -> dict:
    """The norm of bfloat16 gradients against float64, and three steps of Adam on them against torch's on float32 ones."""
    from trl.kernels.streaming_adam import NarrowAdam, adam_step, total_norm

    g = torch.Generator().manual_seed(0)
    big = (5000, 1200) if DEVICE == "cuda" else (50, 12)  # above the size of a chunk, and of a dot product
    shapes = [big, (1,), (7,), (64, 64), (3, 5, 7), *[(96, 64)] * 40]
    start = [torch.randn(shape, generator=g).to(DEVICE) for shape in shapes]
    found: dict[str, Any] = {}
    for name, decay in (("adam", 0.0), ("adamw", 0.01)):
        kind = torch.optim.AdamW if decay else torch.optim.Adam
        ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
        mine, plain = kind(ours, lr=1e-3, weight_decay=decay, fused=True), kind(theirs, lr=1e-3, weight_decay=decay)
        for _ in range(3):
            narrow = [torch.randn(p.shape, generator=g).to(DEVICE, torch.bfloat16) for p in start]
            exact = torch.stack([n.double().square().sum() for n in narrow]).sum().sqrt()
            found["norm_off_by"] = max(
                found.get("norm_off_by", 0.0), abs(float(total_norm(narrow, [])) / float(exact) - 1)
            )
            for p, n in zip(theirs, narrow, strict=True):
                p.grad = n.float() * 0.5
            copies = [n.clone() for n in narrow]
            assert len(adam_step(mine, dict(zip(ours, copies, strict=True)), 0.5)) == len(ours)
            plain.step()
            assert all(torch.equal(c, p.detach().bfloat16()) for c, p in zip(copies, ours, strict=True)), (
                "gradients must hold the new weights"
            )
        found[name] = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    weights_ = [torch.nn.Parameter(p.clone()) for p in start]
    adam_step(NarrowAdam(weights_, lr=1e-3), {p: torch.ones_like(p, dtype=torch.bfloat16) for p in weights_})
    found["narrow_moments"] = max(
        float((p - s).abs().sub(1e-3).abs().max()) for p, s in zip(weights_, start, strict=True)
    )
    assert found["norm_off_by"] < 1e-5 and max(found["adam"], found["adamw"], found["narrow_moments"]) < 2e-6, found
    return found


@check(30)
def grpo_trains() -> dict:
    """The other face of the loop: groups of four responses, no critic; and a rollout of an engine in place of lists."""
    from trl import OnlineTrainer, PPOConfig
    from trl.algorithms import grpo

    fresh_accelerate()
    config = PPOConfig(
        batch_size=8, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-3, dtype="bfloat16", group_size=4
    )
    trainer = OnlineTrainer(config, small("llama"), tokenizer=tokenizer(), algorithm=grpo())
    queries = [q for q in batch(count=2)[0] for _ in range(4)]
    responses = trainer.generate(queries, max_new_tokens=12, **PLAIN)
    stats = trainer.step(queries, responses, [torch.tensor(float(i)) for i in range(8)])
    return {name: float(stats[name]) for name in ("grpo/loss/total", "grpo/grad_norm", "objective/kl")}


@check(40)
def a_run_is_evaluated_and_replayed() -> dict:
    """`train` with held-out prompts and a classifier on the device as reward, then `evaluate`; the embedded models."""
    from transformers import AutoTokenizer

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, assets
    from trl.rewards import ClassifierReward

    fresh_accelerate()
    folder = assets.path("tiny-gpt2-reviews")
    reward = ClassifierReward.from_pretrained(assets.path("tiny-bert-sentiment"), device=DEVICE)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    name = AutoTokenizer.from_pretrained(folder)
    config = PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-4)
    with tempfile.TemporaryDirectory() as run:
        trainer = PPOTrainer(config, model, None, name)
        result = trainer.train(assets.prompts()[:16], reward=reward, steps=2, run_dir=Path(run) / "run", progress=False,
                               eval_prompts=assets.prompts()[16:24], eval_every=1, generation={"max_new_tokens": 8})  # fmt: skip
        compared = trainer.evaluate(assets.prompts()[16:24], reward, generation={"max_new_tokens": 8})
        trainer.save_pretrained(Path(run) / "saved")
    return dict(score=result.metrics["score/mean"], evaluated=str(compared)[:200])


@check(60)
def the_offline_stages_train() -> dict:
    """Two steps each of SFT, a reward model, DPO and KTO, on the device that transformers' Trainer finds."""
    import transformers as tf

    import trl

    def words(*ids: int) -> str:
        return " ".join(f"w{i}" for i in ids)

    pairs = [
        {"prompt": words(5 + i, 6, 7), "chosen": words(8, 9 + i), "rejected": words(4, 30 + i, 12)} for i in range(4)
    ]
    rated = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    texts = [{"text": words(*range(5, 10 + i))} for i in range(4)]
    judge = tf.LlamaForSequenceClassification(tf.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_labels=1, pad_token_id=0,
    ))  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trainer, config, model, rows in (
            ("sft", trl.SFTTrainer, trl.SFTConfig, small("llama"), texts),
            ("reward", trl.RewardTrainer, trl.RewardConfig, judge, pairs),
            ("dpo", trl.DPOTrainer, trl.DPOConfig, small("llama"), pairs),
            ("kto", trl.KTOTrainer, trl.KTOConfig, small("llama"), rated),
        ):
            settings = config(
                output_dir=folder, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2, use_cpu=DEVICE == "cpu",
                per_device_train_batch_size=2, logging_steps=1,
            )  # fmt: skip
            stage = trainer(model, args=settings, train_dataset=rows, processing_class=tokenizer())
            stage.train()
            place = next(stage.model.parameters()).device.type
            found[name] = dict(loss=stage.state.log_history[-1]["train_loss"], device=place)
            assert place == DEVICE and found[name]["loss"] == found[name]["loss"], found
            fresh_accelerate()
    return found


# Running them -------------------------------------------------------------------------------------------------------------


class TooLong(Exception):
    pass


def ring(number: int, frame: Any) -> None:
    raise TooLong("the check's time is over")


def reset() -> None:
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    fresh_accelerate()
    clean()


def main() -> int:
    describe_machine()
    signal.signal(signal.SIGALRM, ring)
    only = set(sys.argv[1:])
    for name, seconds, predicted, work in CHECKS:
        if name in R.data or (only and name not in only):
            continue
        if left() < 8:
            R.put(name, dict(status="skipped", reason="no time left"))
            continue
        R.data[name] = dict(status="died", predicted=predicted)  # what stays if the process ends here
        R.put(name, R.data[name])
        started, line = time.time(), dict[str, Any]()
        try:
            reset()
            signal.alarm(max(1, min(int(seconds * PATIENCE), int(left()))))
            line = dict(status="ok", found=work())
        except AssertionError as error:
            line = dict(status="FAIL", found=str(error)[:1500], at=where(error))
            traceback.print_exc()
        except BaseException as error:
            line = dict(status="ERROR", found=f"{type(error).__name__}: {str(error)[:600]}", at=where(error))
            traceback.print_exc()
        finally:
            signal.alarm(0)
        if predicted:
            line["predicted"] = predicted
        R.put(name, line | dict(seconds=round(time.time() - started, 1)))
        try:
            reset()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                (torch.ones(8, device=DEVICE) + 1).sum().item()
        except Exception as error:
            say(f"the device is in a bad state after {name}: {error}")
            return 75
    return 0


if __name__ == "__main__":
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") or DEVICE == "cpu", (
        "CUBLAS_WORKSPACE_CONFIG=:4096:8 is needed for determinism"
    )
    sys.exit(main())
