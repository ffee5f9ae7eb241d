"""The least time that this machine could take for a job: operations and bytes that cannot be avoided, over its ceilings.

    python bench/roofline.py --model FOLDER [--batch 16 --mini 4 --epochs 4 --query 8 --new 48] [--lora R] [--t5] [--json]

Measures the ceilings (matrix products in float32 and bfloat16, memory traffic) and counts the job from the model's config.
A phase takes at least the longer of its arithmetic and its memory traffic; the bound is the sum over the phases. Counted are
matrix products, attention, reads of the weights and of the key-value cache, gradients and Adam's state; not counted are
activations, norms, the softmax over the vocabulary and drawing tokens: no implementation reaches the bound.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Adam reads a weight, its gradient and two moments and writes all but the gradient, in float32.
ADAM_BYTES = 4 * (4 + 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this machine reached at best."""

    float32: float  # FLOP/s of a matrix product
    bfloat16: float
    traffic: float  # bytes/s read and written

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements: anything else that ran took from both."""
        return Ceilings(**{name: max(value, getattr(other, name)) for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A language model as a reader of tokens sees it: numbers it is multiplied by, and what each earlier token costs."""

    total: int  # trained without adapters
    body: int  # of the (decoder's) layers: every token passes them
    head: int  # of the output layer: a token passes it only where the next one is asked for
    attention: int  # FLOPs of a token for each position it looks at, all layers
    cache: int  # numbers kept for each position, all layers
    encoder: int = 0  # passed by each token of the query (encoder-decoder), with the decoder's keys and values for it
    encoder_attention: int = 0
    adapter: int = 0  # LoRA's, if only these are trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One PPO cycle."""

    query: int  # tokens of each query
    new: int  # tokens sampled for each
    trained: tuple[int, ...]  # tokens of each response that are kept for the update; its length is the batch
    mini: int
    epochs: int

    @classmethod
    def of(cls, *, batch: int, mini: int, epochs: int, query: int, new: int, ragged: int = 0) -> Job:
        """The job of `job.py` with these options: the lengths of its first cycle."""
        lengths = random.Random(1)
        trained = tuple(lengths.randint(ragged, new) if ragged else new for _ in range(batch))
        return cls(query=query, new=new, trained=trained, mini=mini, epochs=epochs)

    @property
    def minibatches(self) -> int:
        return len(self.trained) // self.mini


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the cycle, of which `sample` and `step` time a few together."""

    name: str
    within: str  # "sample" or "step"
    flops: float
    attention_flops: float  # of `flops`
    bytes: float

    def seconds(self, ceilings: Ceilings, dtype: str) -> float:
        return max(self.flops / getattr(ceilings, dtype), self.bytes / ceilings.traffic)


def pairs(start: int, count: int) -> int:
    """Positions that `count` tokens after `start` others look at, each at itself and all before it."""
    return count * start + count * (count + 1) // 2


def read(weights: Weights, query: int, response: int) -> tuple[float, float]:
    """FLOPs of matrix products and of attention for one pass over a query and the `response` tokens that follow it.

    It is also the work of sampling them: with a cache every token is read once. The last token is not read: nothing follows.
    """
    if weights.encoder:
        products = 2 * (weights.encoder * query + (weights.body + weights.head) * response)
        own = weights.encoder_attention * query * query
        return products, own + weights.attention * (pairs(0, response) + query * response)
    tokens = query + response - 1
    return 2 * (weights.body * tokens + weights.head * response), weights.attention * pairs(0, tokens)


def phases(weights: Weights, job: Job, width: int) -> list[Phase]:
    """The cycle's phases; `width` is the bytes of a weight as it is multiplied."""
    batch = len(job.trained)
    once = width * (weights.body + weights.head + weights.encoder)  # the weights read from memory once
    # The prompt gives the first token of a decoder; an encoder gives none.
    steps = job.new if weights.encoder else job.new - 1
    first = read(weights, job.query, 1) if not weights.encoder else read(weights, job.query, 0)
    whole = read(weights, job.query, job.new)
    contexts = job.query * steps + pairs(0, steps)
    kept = [read(weights, job.query, length) for length in job.trained]
    products, attention = sum(p for p, _ in kept), sum(a for _, a in kept)
    # Backward: gradients of the inputs of every product, and of its weights if they are trained.
    passes = 2 if weights.adapter else 3
    adapters = 6 * weights.adapter * sum(job.query + length - 1 for length in job.trained)
    trained = weights.adapter or weights.total
    updates = job.epochs * job.minibatches

    def phase(name: str, within: str, flops: tuple[float, float], traffic: float) -> Phase:
        return Phase(name=name, within=within, flops=sum(flops), attention_flops=flops[1], bytes=traffic)

    return [
        phase("prefill", "sample", (batch * first[0], batch * first[1]), once),
        phase(
            "decode",
            "sample",
            (batch * (whole[0] - first[0]), batch * (whole[1] - first[1])),
            steps * width * (weights.body + weights.head) + width * weights.cache * batch * contexts,
        ),
        phase("score", "step", (2 * products, 2 * attention), 2 * once),
        phase(
            "update",
            "step",
            (job.epochs * (passes * products + adapters), job.epochs * 3 * attention),
            updates * (2 * once + 4 * trained),
        ),
        phase("optimizer", "step", (0, 0), updates * ADAM_BYTES * trained),
    ]


def bound(weights: Weights, job: Job, ceilings: Ceilings, dtype: str | None = None) -> dict[str, Any]:
    """Seconds of the cycle at the ceilings, in the dtype with the higher one unless told."""
    dtype = dtype or ("bfloat16" if ceilings.bfloat16 > ceilings.float32 else "float32")
    parts = phases(weights, job, {"bfloat16": 2, "float32": 4}[dtype])
    seconds = {part.name: part.seconds(ceilings, dtype) for part in parts}
    within = {
        f"{w}_s": sum(seconds[part.name] for part in parts if part.within == w) for w in ("sample", "step")
    }  # as job.py times them
    return {
        "dtype": dtype,
        **within,
        "total_s": sum(seconds.values()),
        "tflop": sum(part.flops for part in parts) / 1e12,
        "gbyte": sum(part.bytes for part in parts) / 1e9,
        "attention_share": {
            w: sum(p.attention_flops for p in parts if p.within == w) / sum(p.flops for p in parts if p.within == w)
            for w in ("sample", "step")
        },
        "seconds": seconds,
    }


def weights_of(config: Any, lora: int = 0, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Weights:
    """Counts a transformers model, made without memory from its config."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both = bool(config.is_encoder_decoder)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if both else AutoModelForCausalLM).from_config(config)
    output = model.get_output_embeddings()
    # Linear layers and GPT-2's; looking a token up multiplies nothing.
    inner = {
        name: module.weight
        for name, module in model.named_modules()
        if module is not output and not isinstance(module, nn.Embedding) and getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
    }  # fmt: skip
    # The decoder's keys and values of the query are made once, from what the encoder read.
    on_query = {
        n for n in inner if n.startswith("encoder.") or ".encoder." in n or n.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    }  # fmt: skip
    encoder = sum(inner[n].numel() for n in on_query)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    own = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_decoder_layers", None) or layers
    return Weights(
        total=sum(p.numel() for p in model.parameters()),
        body=sum(w.numel() for w in inner.values()) - encoder,
        head=output.weight.numel(),
        attention=4 * layers * heads * size,
        cache=2 * layers * own * size,
        encoder=encoder,
        encoder_attention=4 * config.num_hidden_layers * heads * size if both else 0,
        adapter=sum(lora * sum(w.shape) for n, w in inner.items() if n.rpartition(".")[2] in targets),
    )


def measure(hidden: int = 576, inner: int = 1536, vocabulary: int = 49152, seconds: float = 0.4) -> Ceilings:
    """The best of a few products near the model's shapes, and of a copy and a sum of 256 MiB."""
    shapes = [(rows, hidden, inner) for rows in (224, 896)] + [(rows, inner, hidden) for rows in (224, 896)]
    shapes += [(224, hidden, vocabulary), (1024, 1024, 1024), (2048, 2048, 2048)]
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for rows, inputs, outputs in shapes:
            x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
            rates.append(2 * rows * inputs * outputs / _fastest(partial(F.linear, x, w), seconds))
        found[str(dtype).removeprefix("torch.")] = max(rates)
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    copied = 2 * size / _fastest(lambda: target.copy_(source), seconds)
    summed = size / _fastest(lambda: source.sum(), seconds)
    return Ceilings(**found, traffic=max(copied, summed))


def _fastest(work: Callable[[], Tensor], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit in about `seconds`, after one to warm up."""
    times: list[float] = []
    with torch.no_grad():
        work()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 3:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return min(times)


def config_of(model: Path, t5: bool) -> Any:
    """The config of a folder, or of `job.py --t5`."""
    from transformers import AutoConfig, AutoTokenizer

    if not t5:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    from job import t5_config

    return t5_config(AutoTokenizer.from_pretrained(model, trust_remote_code=False))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    for name, usual in (
        ("batch", 16),
        ("mini", 4),
        ("epochs", 4),
        ("query", 8),
        ("new", 48),
        ("ragged", 0),
        ("lora", 0),
    ):
        add(f"--{name}", type=int, default=usual)
    add("--lora-targets", nargs="+", default=["q_proj", "v_proj"])
    add("--t5", action="store_true")
    add("--json", action="store_true", help="print JSON instead of words")
    args = parser.parse_args(argv)
    weights = weights_of(config_of(args.model, args.t5), args.lora, tuple(args.lora_targets))
    job = Job.of(**{n: getattr(args, n) for n in ("batch", "mini", "epochs", "query", "new", "ragged")})
    ceilings = measure()
    found = bound(weights, job, ceilings)
    if args.json:
        print(json.dumps({"ceilings": asdict(ceilings), "weights": asdict(weights), "bound": found}))
        return
    print(
        f"ceilings: float32 {ceilings.float32 / 1e12:.2f} TFLOP/s, bfloat16 {ceilings.bfloat16 / 1e12:.2f} TFLOP/s, "
        f"memory {ceilings.traffic / 1e9:.1f} GB/s"
    )
    print(f"job: {found['tflop']:.2f} TFLOP and {found['gbyte']:.0f} GB, in {found['dtype']}")
    for name, seconds in found["seconds"].items():
        print(f"{name:10} {seconds:6.2f} s")
    print(f"{'bound':10} {found['total_s']:6.2f} s: {args.batch / found['total_s']:.2f} samples/s")


if __name__ == "__main__":
    main()
