"""The work of one PPO cycle on one shape: sampling, scoring, the update; beside `transformers.generate` and a CUDA-graph probe.

    python bench/gpu/bench.py qwen05 | llama1b

64 prompts of 128 tokens, 256 new tokens, mini-batches of 16, 4 epochs, weights at random, exact lengths. What each line holds
is written to results.json at once.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    JOB,
    SHAPES,
    TINY,
    Results,
    attempt,
    bounds,
    ceilings,
    clean,
    describe_machine,
    left,
    numbers_of,
    peak_gb,
    plain_model,
    say,
    sync,
    tokenizer,
)

SHAPE = sys.argv[1] if len(sys.argv) > 1 else "qwen05"
if TINY:
    SHAPE = {"qwen05": "tiny-qwen", "llama1b": "tiny-llama"}.get(SHAPE, SHAPE)
R = Results(f"bench-{SHAPE}")
B, P, N = JOB["batch"], JOB["prompt"], JOB["new"]
WORDS = SHAPES[SHAPE]["vocab_size"]
T: dict[str, Any] = {}  # what later lines need of earlier ones


def prompts(ragged: bool = False, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, WORDS, (P - (i * 29) % (P // 2) if ragged else P,), generator=g).to(DEVICE) for i in range(B)
    ]


def build() -> dict:
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    started = time.time()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain_model(SHAPE))
    config = PPOConfig(
        batch_size=B, mini_batch_size=JOB["mini"], ppo_epochs=JOB["epochs"], learning_rate=1e-6, init_kl_coef=0.05
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        T["trainer"] = trainer = PPOTrainer(config, model, None, tokenizer())
    sync()
    return dict(seconds=time.time() - started, parameters=sum(p.numel() for p in model.parameters()), passes=str(trainer._trl_compute.dtype),
                after_building_gb=peak_gb())  # fmt: skip


def _sample(ragged: bool = False, new: int = N, batch_size: int = B, seed: int = 0) -> tuple[list[torch.Tensor], float]:
    queries = prompts(ragged, seed)
    sync()
    started = time.perf_counter()
    responses = T["trainer"].generate(
        queries, return_prompt=False, batch_size=batch_size, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
        top_p=1.0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    sync()
    return responses, time.perf_counter() - started


def engine_of() -> str:
    """How `generate` samples: our own loop, in a CUDA graph or not; or why transformers' generate does."""
    from trl.rollout import known_obstacle
    from trl.rollout.choice import _takes_fixed_steps

    model = T["trainer"].accelerator.unwrap_model(T["trainer"].model).pretrained_model
    return known_obstacle(model) or ("own, CUDA graph" if _takes_fixed_steps(model) else "own")


def sampling_without_graph(new: int = min(N, 64)) -> dict:
    """Some tokens of our own loop, its steps launched one by one."""
    from trl.rollout.choice import _FIXED_STEPS

    model = T["trainer"].accelerator.unwrap_model(T["trainer"].model).pretrained_model
    before = dict(_FIXED_STEPS)
    _FIXED_STEPS[model] = False
    try:
        _sample(new=min(N, 12))
        _, seconds = _sample(new=new)
    finally:
        _FIXED_STEPS.clear()
        _FIXED_STEPS.update(before)
    return dict(seconds=seconds, tokens_per_s=B * new / seconds, ms_per_token=seconds / new * 1e3, tokens=new)


def sampling(ragged: bool = False, batch_size: int = B) -> dict:
    _sample(ragged, new=min(N, 12), batch_size=batch_size)
    clean()
    responses, seconds = _sample(ragged, batch_size=batch_size)
    assert all(len(r) == N for r in responses), [len(r) for r in responses][:5]
    T["queries"], T["responses"] = prompts(ragged), responses
    return dict(seconds=seconds, tokens_per_s=B * N / seconds, ms_per_token=seconds / N * 1e3, peak_gb=peak_gb(),
                engine=engine_of())  # fmt: skip


def _profiled(work: Any) -> tuple[Any, list[Any]]:
    """What `work` returns, and the kernels it ran; on a CPU, its operations."""
    from torch.profiler import ProfilerActivity, profile

    activity, kind = (
        (ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA)
        if DEVICE == "cuda"
        else (ProfilerActivity.CPU, torch.autograd.DeviceType.CPU)
    )
    with profile(activities=[activity]) as seen:
        found = work()
        sync()
    return found, [event for event in seen.events() if event.device_type == kind]


def sampling_profile() -> dict:
    """Kernels, and how busy the device is, over some tokens in the middle of a response."""
    counts, busy, names = {}, {}, {}
    for new in (8, 24):
        _, kernels = _profiled(lambda new=new: _sample(new=new))
        counts[new], busy[new] = len(kernels), sum(e.time_range.elapsed_us() for e in kernels)
        names[new] = Counter(e.name[:60] for e in kernels)
    tokens = 16
    return dict(
        kernels_per_token=(counts[24] - counts[8]) / tokens,
        device_ms_per_token=(busy[24] - busy[8]) / tokens / 1e3,
        most={name: n / tokens for name, n in (names[24] - names[8]).most_common(12)},
    )


def generate_of_transformers() -> dict:
    """The same prompts and lengths; bfloat16 weights, the dynamic cache, plain sampling."""
    model = T.get("plain")
    if model is None:
        model = T["plain"] = plain_model(SHAPE).bfloat16()
    tokens = torch.stack(prompts())
    options = dict(
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=0,
        eos_token_id=None,
    )

    def run(new: int) -> float:
        sync()
        started = time.perf_counter()
        with torch.no_grad():
            found = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        sync()
        assert found.shape[1] == P + new
        return time.perf_counter() - started

    run(min(N, 12))
    clean()
    seconds = run(N)
    return dict(seconds=seconds, tokens_per_s=B * N / seconds, ms_per_token=seconds / N * 1e3, peak_gb=peak_gb())


class _Fixed:
    """Layers of a cache of a fixed size, at a place that is a tensor: nothing of it changes from token to token but numbers."""

    @staticmethod
    def cache(model: Any, room: int) -> tuple[Any, torch.Tensor]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        c = model.config
        size = c.hidden_size // c.num_attention_heads

        class Layer(DynamicLayer):
            def __init__(self) -> None:
                super().__init__()
                shape = (B, c.num_key_value_heads, room, size)
                self.whole = [torch.zeros(shape, dtype=model.dtype, device=DEVICE) for _ in range(2)]
                self.keys, self.values = self.whole
                self.is_initialized = True

            def update(
                self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
            ) -> tuple[torch.Tensor, torch.Tensor]:
                for whole, new in zip(self.whole, (key, value), strict=True):
                    whole.index_copy_(2, place, new)
                return self.whole[0], self.whole[1]

        cache = DynamicCache(config=c)
        cache.layers = [Layer() for _ in range(c.num_hidden_layers)]
        return cache, place


def _grouped(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: Any = None,
    **_: Any,
) -> Any:
    """One new token: the heads that share a key are queries of one head, so that keys are not repeated."""
    rows, heads, _, size = query.shape
    shared = key.shape[1]
    asked = query.view(rows, shared, heads // shared, size)
    mask = attention_mask.expand(rows, shared, heads // shared, -1)
    out = F.scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


def graph_probe() -> dict:
    """What a captured decoding step would give, the model's own layers unchanged: forward pass, `draw` and bookkeeping in one graph."""
    from transformers import AttentionInterface

    from trl.functional.sampling import draw

    model = T.get("plain")
    if model is None:
        model = T["plain"] = plain_model(SHAPE).bfloat16()
    AttentionInterface.register("gpu_probe", _grouped)
    room = -(-(P + N) // 64) * 64
    cache, place = _Fixed.cache(model, room)
    tokens = torch.stack(prompts())
    uniforms = torch.rand(N, B, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        before = model(tokens, use_cache=True)
        for layer, plain in zip(cache.layers, before.past_key_values.layers, strict=True):
            layer.whole[0][:, :, :P], layer.whole[1][:, :, :P] = plain.keys, plain.values
        token = draw(before.logits[:, -1].float(), uniforms[0])[0]
        expected = model(token[:, None], past_key_values=before.past_key_values, use_cache=True).logits[:, -1].float()
        del before
        place.fill_(P)
        mask = torch.full((B, 1, 1, room), -torch.inf, dtype=model.dtype, device=DEVICE)
        mask[..., :P] = 0
        at = torch.ones(1, dtype=torch.int64, device=DEVICE)
        drawn = torch.zeros(N + 8, B, dtype=torch.int64, device=DEVICE)
        spare = torch.cat([uniforms, uniforms[:8]])
        here: dict[str, torch.Tensor] = {}

        def step() -> None:
            mask.index_fill_(3, place, 0)
            here["logits"] = (
                model(
                    input_ids=token[:, None],
                    position_ids=place.expand(B, 1),
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                )
                .logits[:, -1]
                .float()
            )
            new = draw(here["logits"], spare.index_select(0, at)[0])[0]
            drawn.index_copy_(0, at, new[None])
            token.copy_(new)
            place.add_(1)
            at.add_(1)

        model.config._attn_implementation = "gpu_probe"
        try:
            first = token.clone()
            step()
            off = ((here["logits"] - expected).square().mean().sqrt() / expected.std()).item()
            token.copy_(first), place.fill_(P), at.fill_(1), mask.fill_(-torch.inf)
            mask[..., :P] = 0
            eager = None
            graph = None
            if DEVICE == "cuda":
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(2):
                        step()
                torch.cuda.current_stream().wait_stream(side)
                sync()
                started = time.perf_counter()
                for _ in range(4):
                    step()
                sync()
                eager = (time.perf_counter() - started) / 4
                graph = torch.cuda.CUDAGraph()
                started = time.perf_counter()
                with torch.cuda.graph(graph):
                    step()
                captured = time.perf_counter() - started
                token.copy_(first), place.fill_(P), at.fill_(1), mask.fill_(-torch.inf)
                mask[..., :P] = 0
            sync()
            started = time.perf_counter()
            for _ in range(N - 1):
                graph.replay() if graph is not None else step()
            sync()
            seconds = time.perf_counter() - started
        finally:
            model.config._attn_implementation = "sdpa"
    assert off < 0.5, off
    return dict(seconds=seconds, ms_per_token=seconds / (N - 1) * 1e3, tokens_per_s=B * (N - 1) / seconds, logits_off_by=off,
                eager_ms_per_token=None if eager is None else eager * 1e3, capture_s=None if graph is None else captured)  # fmt: skip


def _timed_step(responses: list[torch.Tensor], queries: list[torch.Tensor]) -> dict:
    """`step`, its parts by the clock with the device waited for."""
    trainer, parts = T["trainer"], Counter()

    def clocked(name: str, plain: Any) -> Any:
        def work(*args: Any, **kwargs: Any) -> Any:
            sync()
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                sync()
                parts[name] += time.perf_counter() - started

        return work

    evaluation = trainer._trl_evaluation
    replacements = {
        "_trl_evaluation": lambda batch, evaluator: clocked("scoring", evaluation(batch, evaluator)),
        "_trl_prepare": clocked("prepare", trainer._trl_prepare),
        "_trl_update": clocked("update", trainer._trl_update),
    }
    scores = [torch.tensor(float(i % 5) - 2) for i in range(len(responses))]
    for name, work in replacements.items():
        setattr(trainer, name, work)
    clean()
    sync()
    started = time.perf_counter()
    try:
        stats = trainer.step(queries, responses, scores)
    finally:
        for name in replacements:
            delattr(trainer, name)
    sync()
    total = time.perf_counter() - started
    assert float(stats["ppo/skipped_updates"]) == 0.0, "an update was skipped"
    return dict(step=total, scoring=parts["scoring"], update=parts["update"], rewards=parts["prepare"] - parts["scoring"],
                rest=total - parts["prepare"] - parts["update"], peak_gb=peak_gb(), kl=float(stats["objective/kl"]),
                grad_norm=float(stats["ppo/grad_norm"]), tokens=sum(map(len, responses)) + sum(map(len, queries)),
                as_the_library_times_it={k.removeprefix("time/ppo/"): float(v) for k, v in stats.items() if k.startswith("time/ppo/") and "optimizer" not in k})  # fmt: skip


def _batch(ragged: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    queries = prompts(ragged, seed=7)
    lengths = [N - (i * 53) % (3 * N // 4) if ragged else N for i in range(B)]
    responses = T.get("responses") or [torch.randint(3, WORDS, (N,), generator=g).to(DEVICE) for _ in range(B)]
    return queries, [r[:n] for r, n in zip(responses, lengths, strict=True)]


def warm_step() -> dict:
    trainer = T["trainer"]
    epochs, trainer.config.ppo_epochs = trainer.config.ppo_epochs, 1
    queries, responses = _batch(False)
    try:
        return _timed_step(responses, queries)
    finally:
        trainer.config.ppo_epochs = epochs


def step(ragged: bool = False) -> dict:
    queries, responses = _batch(ragged)
    return _timed_step(responses, queries)


def update_profile() -> dict:
    """One epoch over a quarter of the batch: kernels, how busy the device is, and where its time goes."""
    trainer = T["trainer"]
    before = trainer.config.ppo_epochs, trainer.config.batch_size
    trainer.config.ppo_epochs, trainer.config.batch_size = 1, JOB["mini"]
    queries, responses = (x[: JOB["mini"]] for x in _batch(False))
    try:
        parts, kernels = _profiled(lambda: _timed_step(responses, queries))
    finally:
        trainer.config.ppo_epochs, trainer.config.batch_size = before
    by_name: Counter = Counter()
    for e in kernels:
        by_name[e.name[:80]] += e.time_range.elapsed_us()
    most = {name: us / 1e3 for name, us in by_name.most_common(18)}
    return dict(parts=parts, kernels=len(kernels), device_ms=sum(by_name.values()) / 1e3, most_ms=most)


def bound() -> dict:
    micro = Results("micro")
    if "bf16" not in (micro.data.get("ceilings") or {}):
        attempt(micro, "ceilings", 3, ceilings)
    flops, traffic = (micro.data["ceilings"][name] for name in ("bf16", "traffic"))
    return dict(bounds(SHAPE, flops, traffic), flops=flops, traffic=traffic, **numbers_of(SHAPE))


def static_generate() -> dict:
    """`generate` with a static cache, which transformers compiles by itself; the first call compiles."""
    model = T.get("plain")
    if model is None:
        model = T["plain"] = plain_model(SHAPE).bfloat16()
    tokens = torch.stack(prompts())
    options = dict(attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None,
                   max_new_tokens=N, min_new_tokens=N, cache_implementation="static")  # fmt: skip
    found = {}
    for name in ("first_s", "seconds"):
        sync()
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(tokens, **options)
        sync()
        found[name] = time.perf_counter() - started
    return dict(found, tokens_per_s=B * N / found["seconds"])


def main() -> None:
    describe_machine()
    slow = SHAPE == "llama1b"
    attempt(R, "bound", 0, bound)
    attempt(R, "build", 8, build)
    if "trainer" in T:
        attempt(R, "sampling", 14, sampling)
        attempt(R, "warm_step", 8, warm_step)
        attempt(R, "step", 10, step)
    attempt(R, "generate_of_transformers", 14, generate_of_transformers)
    if "trainer" in T:
        attempt(R, "sampling_ragged", 14, lambda: sampling(ragged=True))
        attempt(R, "step_ragged", 10, lambda: step(ragged=True))
        if slow or TINY:
            attempt(R, "sampling_as_train_asks", 14, lambda: sampling(batch_size=16))
    attempt(R, "graph_probe", 8, graph_probe)
    if "trainer" in T:
        attempt(R, "sampling_without_graph", 6, sampling_without_graph)
        attempt(R, "sampling_profile", 8, sampling_profile)
        attempt(R, "update_profile", 8, update_profile)
    if not slow:
        T.pop("trainer", None)
        clean()
        attempt(R, "static_generate", 45, static_generate)
    say(f"bench {SHAPE}: {left():.0f} s were left")


if __name__ == "__main__":
    main()
