"""The card's ceilings, and single operations of the library beside what a GPU could do in their place."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from common import DEVICE, SHAPES, TINY, Results, attempt, ceilings, clean, describe_machine, host_ms, left, say, timed

R = Results("micro")
SHAPE = "tiny-qwen" if TINY else "qwen05"
S = SHAPES[SHAPE]


def launches() -> dict:
    """How long the host takes to ask for a small operation, and the device to do it, one by one and as a graph."""
    x = torch.zeros(64, 64, device=DEVICE)
    count = 200

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    found = {"host_us": host_ms(many) * 1e3 / count, "device_us": timed(many) * 1e3 / count}
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            many()
        found["graph_us"] = timed(graph.replay) * 1e3 / count
    return found


def parameters() -> list[torch.Tensor]:
    h, i = S["hidden_size"], S["intermediate_size"]
    kv = S["num_key_value_heads"] * (h // S["num_attention_heads"])
    shapes = [(S["vocab_size"], h)]
    for _ in range(S["num_hidden_layers"]):
        shapes += [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i), (h,), (h,), (h,), (kv,), (kv,)]
    return [torch.randn(shape, device=DEVICE) * 0.02 for shape in [*shapes, (h,)]]


def norm() -> dict:
    from trl.kernels.streaming_adam import total_norm

    gradients = [p.bfloat16() for p in parameters()]

    def foreach() -> torch.Tensor:
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()

    gap = abs(float(total_norm(gradients, [])) / float(foreach()) - 1)
    return dict(tensors=len(gradients), ours_ms=timed(lambda: total_norm(gradients, []), warm=1),
                ours_host_ms=host_ms(lambda: total_norm(gradients, [])), foreach_ms=timed(foreach), relative_gap=gap)  # fmt: skip


def adam() -> dict:
    from trl.kernels.streaming_adam import adam_step

    weights = [torch.nn.Parameter(p) for p in parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-6, fused=True)
    gradients = {p: p.detach().bfloat16() for p in weights}
    found = dict(ours_ms=timed(lambda: adam_step(optimizer, gradients, 0.5), warm=1, repeat=5),
                 ours_host_ms=host_ms(lambda: adam_step(optimizer, gradients, 0.5), repeat=3))  # fmt: skip
    gradients.clear()
    for p in weights:
        p.grad = p.detach().clone()
    found["torch_fused_float32_grads_ms"] = timed(optimizer.step, repeat=5)
    count = sum(p.numel() for p in weights)
    found["bytes_28_per_parameter_ms"] = (
        28 * count / R.data["ceilings"]["traffic"] * 1e3 if "traffic" in (R.data.get("ceilings") or {}) else None
    )
    return found


def _logits_loss(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    total = logits.logsumexp(-1)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1) - total
    with torch.no_grad():
        entropy = total - (logits.softmax(-1) * logits).sum(-1)
    return chosen.sum() + 0 * entropy.sum()


def projection() -> dict:
    from trl.kernels.projection import projected_logprobs_and_entropy

    rows = 64 if TINY else 16 * 256
    hidden = torch.randn(rows, S["hidden_size"], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(S["vocab_size"], S["hidden_size"], device=DEVICE) * 0.02).bfloat16().requires_grad_()
    tokens = torch.randint(S["vocab_size"], (rows,), device=DEVICE)

    def ours(backward: bool = True) -> None:
        chosen, _ = projected_logprobs_and_entropy(hidden, weight, tokens)
        if backward:
            chosen.sum().backward()
            hidden.grad = weight.grad = None

    def naive() -> None:
        _logits_loss(hidden, weight, tokens).backward()
        hidden.grad = weight.grad = None

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            logits @ weight
            logits.t() @ hidden

    found = dict(rows=rows)
    for name, work in (("ours", ours), ("naive_full_logits", naive), ("three_products_alone", products)):
        clean()
        found[f"{name}_ms"] = timed(work, repeat=5, warm=1)
        found[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None
    with torch.no_grad():
        found["ours_forward_ms"] = timed(lambda: ours(False), repeat=5, warm=1)
    return found


def projection_compiled() -> dict:
    """The same in 8 pieces of rows through torch.compile: what fused elementwise work would give."""
    rows, pieces = (64, 2) if TINY else (16 * 256, 8)
    hidden = torch.randn(rows, S["hidden_size"], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(S["vocab_size"], S["hidden_size"], device=DEVICE) * 0.02).bfloat16().requires_grad_()
    tokens = torch.randint(S["vocab_size"], (rows,), device=DEVICE)
    started = time.time()
    code = torch.compile(_logits_loss, dynamic=False)

    def work() -> None:
        for h, t in zip(hidden.split(rows // pieces), tokens.split(rows // pieces), strict=True):
            code(h, weight, t).backward()
        hidden.grad = weight.grad = None

    work()
    found = dict(compile_s=time.time() - started, compiled_ms=timed(work, repeat=5, warm=1))
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None
    return found


def drawing() -> dict:
    from trl.functional.sampling import draw

    rows = 4 if TINY else 64
    logits = torch.randn(rows, S["vocab_size"], device=DEVICE)
    uniforms = torch.rand(rows, dtype=torch.float64).to(DEVICE)

    def exponential() -> torch.Tensor:
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_(1)).argmax(-1)

    return dict(ours_ms=timed(lambda: draw(logits, uniforms)), ours_host_ms=host_ms(lambda: draw(logits, uniforms)),
                multinomial_ms=timed(lambda: torch.multinomial(logits.softmax(-1), 1)), exponential_ms=timed(exponential))  # fmt: skip


def attention() -> dict:
    """Ragged sequences of 192 to 384 tokens, forward and backward, all layers' worth is this times the layers."""
    heads, shared, size = (
        S["num_attention_heads"],
        S["num_key_value_heads"],
        S["hidden_size"] // S["num_attention_heads"],
    )
    count, longest = (4, 16) if TINY else (16, 384)
    lengths = [longest // 2 + (i * 37) % (longest // 2 + 1) for i in range(count)]
    lengths[0] = longest
    dtype = torch.bfloat16

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True)

    q, k, v = make(count, heads, longest, size), make(count, shared, longest, size), make(count, shared, longest, size)
    seen = torch.tensor([[j >= longest - n for j in range(longest)] for n in lengths], device=DEVICE)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=DEVICE).tril()
    mask = (causal[None] & seen[:, None, :])[:, None]
    mask = mask | torch.eye(longest, dtype=torch.bool, device=DEVICE)

    def backward(out: torch.Tensor, *inputs: torch.Tensor) -> None:
        out.sum().backward()
        for x in inputs:
            x.grad = None

    def masked() -> None:  # as transformers does with a padding mask: keys and values are repeated for every head
        wide = [
            x[:, :, None].expand(-1, -1, heads // shared, -1, -1).reshape(count, heads, longest, size) for x in (k, v)
        ]
        backward(F.scaled_dot_product_attention(q, *wide, attn_mask=mask), q, k, v)

    def causal_only() -> None:
        backward(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), q, k, v)

    found = dict(lengths_mean=sum(lengths) / count, masked_padded_ms=timed(masked), causal_padded_ms=timed(causal_only))
    if DEVICE == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        total = sum(lengths)
        a, b, c = make(total, heads, size), make(total, shared, size), make(total, shared, size)
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)

        def varlen(how: dict) -> None:
            backward(varlen_attn(a, b, c, ends, ends, longest, longest, window_size=(-1, 0), **how), a, b, c)

        for how in ({}, {"enable_gqa": True}):
            try:
                found["varlen_packed_ms"] = timed(lambda how=how: varlen(how))
                break
            except (TypeError, RuntimeError, ValueError) as error:
                found["varlen_error"] = f"{type(error).__name__}: {str(error)[:200]}"
    from trl.kernels.packed_attention import _RUNS, packed_attention, runs_of

    total = sum(lengths)
    x, y, z = make(1, heads, total, size), make(1, shared, total, size), make(1, shared, total, size)
    token = _RUNS.set(runs_of(sorted(lengths)))

    class Layer:
        is_causal, training = True, False

    found["our_cpu_blocks_ms"] = timed(
        lambda: backward(packed_attention(Layer(), x, y, z, None)[0], x, y, z), repeat=5, warm=1
    )
    _RUNS.reset(token)
    return found


def gae_loop() -> dict:
    from trl.functional import gae

    rows, columns = (4, 16) if TINY else (64, 383)
    rewards, values = torch.randn(rows, columns, device=DEVICE), torch.randn(rows, columns, device=DEVICE)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE)
    return dict(ours_ms=timed(lambda: gae(rewards, values, mask, gamma=1.0, lam=0.95), repeat=3, warm=1))


def main() -> None:
    describe_machine()
    for key, seconds, work in (
        ("ceilings", 3, ceilings), ("launches", 2, launches), ("norm", 3, norm), ("adam", 4, adam),
        ("projection", 4, projection), ("drawing", 2, drawing), ("attention", 4, attention), ("gae", 2, gae_loop),
        ("projection_compiled", 25, projection_compiled),
    ):  # fmt: skip
        if key == "ceilings" and "bf16" in (R.data.get(key) or {}):
            continue  # a bench before this one has measured them
        attempt(R, key, seconds, work)
        clean()
    say(f"micro: {left():.0f} s were left")
    assert math.isfinite(left())


if __name__ == "__main__":
    main()
