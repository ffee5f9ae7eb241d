"""What the programs of bench/gpu share: the device, the clock, the shapes, the results file."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not os.environ.get("GPU_CHECK_CPU") else "cpu"
TINY = DEVICE == "cpu" or bool(os.environ.get("GPU_CHECK_TINY"))
OUT = Path(os.environ.get("OUT", "gpu-check-out"))
OUT.mkdir(parents=True, exist_ok=True)
DEADLINE = float(os.environ.get("GPU_CHECK_STAGE_DEADLINE", time.time() + 3600))
if DEVICE == "cpu":
    os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate looks for a GPU by itself

# Qwen2.5-0.5B and Llama-3.2-1B, from their configurations; weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen05": dict(kind="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                   num_attention_heads=14, num_key_value_heads=2),
    "llama1b": dict(kind="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                    num_attention_heads=32, num_key_value_heads=8),
    "tiny-qwen": dict(kind="qwen2", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2),
    "tiny-llama": dict(kind="llama", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2),
}  # fmt: skip
JOB = (
    dict(batch=64, prompt=128, new=256, mini=16, epochs=4)
    if not TINY
    else dict(batch=8, prompt=8, new=8, mini=4, epochs=2)
)


def left() -> float:
    return DEADLINE - time.time()


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clean() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None


def say(*words: Any) -> None:
    print(*words, flush=True)


class Results:
    """A program's part of results.json, which is written anew after every number, so that a stopped program loses nothing."""

    path = OUT / "results.json"

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[str, Any] = self.everything().get(name, {})

    @classmethod
    def everything(cls) -> dict[str, Any]:
        return json.loads(cls.path.read_text()) if cls.path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        self.data[key] = value
        staging = self.path.with_suffix(".tmp")
        staging.write_text(json.dumps(self.everything() | {self.name: self.data}, indent=1, default=str))
        staging.replace(self.path)
        say(f"[{time.strftime('%H:%M:%S')}] {key}: {json.dumps(value, default=str)[:600]}")


def describe_machine() -> None:
    """Writes what runs here to the part "machine" of the results, once."""
    results = Results("machine")
    if results.data:
        return

    found = dict(torch=torch.__version__, transformers=metadata.version("transformers"), accelerate=metadata.version("accelerate"),
                 python=platform.python_version(), device=DEVICE, threads=torch.get_num_threads())  # fmt: skip
    for name in ("peft", "triton", "flash_attn", "kernels", "vllm", "liger_kernel", "bitsandbytes", "datasets"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if DEVICE == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= dict(
            card=p.name, memory_gb=p.total_memory / 1e9, sms=p.multi_processor_count, l2_mb=p.L2_cache_size / 2**20
        )
    for key, value in found.items():
        results.put(key, value)


def where(error: BaseException) -> str:
    """The last line of this library that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/trl/" in f.filename]
    return f"{frames[-1].filename.split('/trl/')[-1]}:{frames[-1].lineno}" if frames else "outside of trl"


def attempt(results: Results, key: str, seconds: float, work: Any) -> Any:
    """Runs a measurement if there is time for it; an error is a result, too."""
    if left() < seconds:
        results.put(key, {"skipped": f"{left():.0f} s left, {seconds:.0f} s wanted"})
        return None
    started = time.time()
    try:
        found = work()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        results.put(key, {"error": f"{type(error).__name__}: {str(error)[:400]}", "at": where(error)})
        traceback.print_exc()
        clean()
        return None
    if isinstance(found, dict):
        found.setdefault("wall_s", round(time.time() - started, 2))
    results.put(key, found)
    return found


def timed(work: Any, repeat: int = 10, warm: int = 3, seconds: float = 3.0) -> float:
    """Median milliseconds of `work`; on a GPU by events, over as many runs as fit into `seconds`."""
    for _ in range(warm):
        work()
    sync()
    found, until = [], time.time() + seconds
    for _ in range(repeat):
        if DEVICE == "cuda":
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            work()
            b.record()
            b.synchronize()
            found.append(a.elapsed_time(b))
        else:
            a = time.perf_counter()
            work()
            found.append((time.perf_counter() - a) * 1e3)
        if time.time() > until:
            break
    return sorted(found)[len(found) // 2]


def host_ms(work: Any, repeat: int = 5) -> float:
    """Milliseconds until the host is free again, without waiting for the device: what a launch-bound loop pays."""
    found = []
    for _ in range(repeat):
        sync()
        a = time.perf_counter()
        work()
        found.append((time.perf_counter() - a) * 1e3)
    sync()
    return sorted(found)[len(found) // 2]


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy on the device (read and written), and operations per second of matrix products."""
    n = 2**20 if TINY else 2**30
    a, b = torch.empty(n, dtype=torch.uint8, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    found = {"traffic": 2 * n / (timed(lambda x=a, y=b: y.copy_(x)) / 1e3)}
    del a, b
    m = 256 if TINY else 8192
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        x, y = (torch.randn(m, m, device=DEVICE, dtype=dtype) for _ in range(2))
        found[name] = 2 * m**3 / (timed(lambda x=x, y=y: x @ y) / 1e3)
        del x, y
    torch.set_float32_matmul_precision("highest")
    clean()
    return found


def tokenizer(words: int = 61) -> Any:
    """A word-level tokenizer, made without files: 0 pads, 1 ends, 2 begins."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w3"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w3"
    )


def plain_model(shape: str, device: str = DEVICE, seed: int = 0) -> Any:
    """A transformers model of random weights, float32, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    settings = dict(SHAPES[shape])
    kind = settings.pop("kind")
    settings |= dict(
        max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=1
    )
    make, config = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "llama": (LlamaForCausalLM, LlamaConfig)}[kind]
    torch.manual_seed(seed)
    with torch.device(device):
        return make(config(**settings)).eval()


def numbers_of(shape: str) -> dict[str, int]:
    """Parameters of the layers and of the head, and numbers of the key-value cache per token."""
    s = SHAPES[shape]
    h, i, kv = (
        s["hidden_size"],
        s["intermediate_size"],
        s["num_key_value_heads"] * (s["hidden_size"] // s["num_attention_heads"]),
    )
    layers = s["num_hidden_layers"] * (2 * h * h + 2 * h * kv + 3 * h * i)
    return dict(layers=layers, head=s["vocab_size"] * h, cache=2 * kv * s["num_hidden_layers"])


def bounds(shape: str, flops: float, traffic: float, job: dict[str, int] = JOB) -> dict[str, float]:
    """Seconds of each phase at the ceilings: matrix products and attention left out of nothing but the softmax and the norms."""
    n, b, p, r = numbers_of(shape), job["batch"], job["prompt"], job["new"]
    total = n["layers"] + n["head"]
    token = max((2 * total + 2 * n["cache"] * b * (p + r / 2)) / traffic, 2 * b * total / flops)
    sample = r * token + 2 * b * p * n["layers"] / flops
    tokens = b * (p + r)
    score = 2 * (2 * n["layers"] * tokens + 2 * n["head"] * b * r) / flops
    update = job["epochs"] * 3 * (2 * n["layers"] * tokens + 2 * n["head"] * b * r) / flops
    steps = job["epochs"] * b // job["mini"]
    return dict(sample=sample, score=score, update=update + steps * 28 * total / traffic)
