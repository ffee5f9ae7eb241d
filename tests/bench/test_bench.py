"""The pure parts of bench/: what is counted, how results become a table, and models for old transformers."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import compare
import curves
import peers
import roofline
from roofline import Ceilings, Job, Weights

# 2 layers of width 8 with 2 heads of 4 and 1 key-value head, 16 inside, 32 words, tied.
# A layer: q and o 8x8 each, k and v 8x4 each, three of 8x16: 64 + 64 + 32 + 32 + 384 = 576.
LLAMA = Weights(total=2 * 576 + 256 + 5 * 8, body=2 * 576, head=256, attention=4 * 2 * 2 * 4, cache=2 * 2 * 1 * 4)


def llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip


def test_weights_of_a_decoder_are_counted() -> None:
    assert roofline.weights_of(llama_config()) == LLAMA


def test_an_adapter_counts_both_of_its_matrices() -> None:
    # Rank 3 on q (8 to 8) and v (8 to 4), in two layers.
    assert roofline.weights_of(llama_config(), lora=3).adapter == 2 * 3 * ((8 + 8) + (8 + 4))


def test_conv1d_of_gpt2_is_a_matrix_and_embeddings_are_not() -> None:
    from transformers import GPT2Config

    found = roofline.weights_of(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    assert (found.body, found.head) == (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8, 32 * 8)


def test_an_encoder_decoder_makes_keys_and_values_of_the_query_once() -> None:
    from transformers import T5Config

    config = T5Config(
        d_model=8,
        d_kv=4,
        num_heads=2,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=3,
        vocab_size=32,
        decoder_start_token_id=0,
    )
    found = roofline.weights_of(config)
    attention, inner = 4 * 8 * 8, 2 * 8 * 16
    assert found.encoder == attention + inner + 3 * 2 * 64
    assert found.body == 3 * (attention + 2 * 64 + inner)
    assert (found.attention, found.encoder_attention) == (4 * 3 * 8, 4 * 1 * 8)


def test_tokens_look_at_themselves_and_all_before() -> None:
    assert roofline.pairs(0, 3) == 1 + 2 + 3
    assert roofline.pairs(5, 2) == 6 + 7


def test_a_cycle_by_hand() -> None:
    weights = Weights(total=120, body=100, head=10, attention=8, cache=4)
    # Two responses of 3 tokens after queries of 2: 4 tokens are read, 3 of them ask for the next one, 1+2+3+4 pairs.
    job = Job(query=2, new=3, trained=(3, 3), mini=1, epochs=2)
    products, attention = 2 * (100 * 4 + 10 * 3), 8 * 10
    found = {phase.name: phase for phase in roofline.phases(weights, job, width=2)}
    assert found["prefill"].flops == 2 * (2 * (100 * 2 + 10) + 8 * 3)
    assert found["prefill"].flops + found["decode"].flops == 2 * (products + attention)
    # Two steps read the weights, and the cache of 3 and of 4 positions for each of two rows.
    assert found["decode"].bytes == 2 * 2 * 110 + 2 * 4 * 2 * (3 + 4)
    assert found["score"].flops == 2 * 2 * (products + attention)
    assert found["update"].flops == 2 * 3 * 2 * (products + attention)
    assert found["update"].attention_flops == 2 * 3 * 2 * attention
    assert found["update"].bytes == 4 * (2 * 2 * 110 + 4 * 120)
    assert found["optimizer"].bytes == 4 * 28 * 120


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    job = Job(query=2, new=3, trained=(3, 3), mini=1, epochs=1)
    weights = Weights(total=120, body=100, head=10, attention=0, cache=4, adapter=6)
    found = {phase.name: phase for phase in roofline.phases(weights, job, width=2)}
    assert found["update"].flops == 2 * (2 * 2 * (100 * 4 + 10 * 3) + 6 * 6 * 4)
    assert found["optimizer"].bytes == 2 * 28 * 6


def test_an_encoder_decoder_by_hand() -> None:
    weights = Weights(total=300, body=100, head=10, attention=8, cache=4, encoder=50, encoder_attention=6)
    job = Job(query=2, new=3, trained=(3,), mini=1, epochs=1)
    found = {phase.name: phase for phase in roofline.phases(weights, job, width=4)}
    assert found["prefill"].flops == 2 * 50 * 2 + 6 * 4
    assert found["decode"].flops == 2 * 110 * 3 + 8 * (1 + 2 + 3 + 2 * 3)


def test_the_bound_takes_the_slower_side_of_each_phase() -> None:
    weights = Weights(total=120, body=100, head=10, attention=0, cache=0)
    job = Job(query=2, new=3, trained=(3,), mini=1, epochs=1)
    slow_memory = roofline.bound(weights, job, Ceilings(float32=1e12, bfloat16=2e12, traffic=1.0))
    assert slow_memory["dtype"] == "bfloat16"
    assert slow_memory["seconds"]["prefill"] == 2 * 110
    slow_products = roofline.bound(weights, job, Ceilings(float32=1.0, bfloat16=0.5, traffic=1e12))
    assert slow_products["dtype"] == "float32"
    assert slow_products["seconds"]["score"] == 2 * 2 * (100 * 4 + 10 * 3)
    assert slow_products["sample_s"] + slow_products["step_s"] == pytest.approx(slow_products["total_s"])


def test_ceilings_keep_the_higher_of_each() -> None:
    assert Ceilings(float32=1, bfloat16=5, traffic=3).best(Ceilings(float32=2, bfloat16=4, traffic=3)) == Ceilings(
        float32=2, bfloat16=5, traffic=3
    )


def cycles(*seconds: float, peak: float = 100.0) -> list[dict[str, Any]]:
    """A run whose first cycle took a thousand seconds."""
    rows = [
        {"cycle": i, "sample_s": s / 4, "step_s": 3 * s / 4, "samples_per_s": 8 / s}
        for i, s in enumerate((1e3, *seconds))
    ]
    return [*rows, {"peak_mb": peak}]  # type: ignore[list-item]


def test_a_table_compares_medians_without_the_first_cycle() -> None:
    results: dict[str, Any] = {
        ": ours": [cycles(4.0, 5.0, 4.0), cycles(4.0, peak=120.0)],
        ": ours, float32": [cycles(8.0)],
        ": peer": [cycles(12.0)],
        ": broken": ["ImportError: no | such name"],
        ": later": [],
    }
    lines = {line["system"]: line for line in compare.table(results, {"": 2.0})}
    assert lines["ours"]["cycle_s"] == 4.0
    assert (lines["ours"]["sample_s"], lines["ours"]["peak_mb"], lines["ours"]["cycles"]) == (1.0, 120.0, 4)
    assert (lines["ours"]["of_bound"], lines["peer"]["of_bound"]) == (2.0, 6.0)
    assert (lines["peer"]["ours_is"], lines["peer"]["ours_float32_is"]) == (3.0, 1.5)
    text = compare.markdown(list(lines.values())).splitlines()
    assert {line.count("|") for line in text} == {text[0].count("|")}
    assert "| peer | 3.0 | 9.0 | 12.0 to 12.0 | 0.67 | 100 | 3.00× | 1.50× | 6.0 |" in text
    assert text[-2].startswith("| broken (failed: ImportError: no / such name) |")
    assert text[-1].startswith("| later (not run yet) |")


def test_groups_are_compared_among_themselves() -> None:
    results: dict[str, Any] = {
        f"batch {b}: {s}": [cycles(t)] for b, s, t in ((1, "a", 2.0), (1, "b", 4.0), (2, "a", 10.0))
    }
    assert [line["ours_is"] for line in compare.table(results)] == [1.0, 2.0, 1.0]


def test_every_system_runs_in_turn_and_a_failure_is_not_fatal() -> None:
    systems = [compare.System(name=name, peer=name, script="job.py") for name in ("a", "b")]
    order, written = [], []

    def start(system: compare.System, setting: tuple[str, ...]) -> compare.Rows:
        order.append(system.name)
        if system.name == "b":
            raise RuntimeError("it broke")
        return cycles(1.0)

    found = compare.compare(systems, [()], 2, start, lambda results: written.append(json.dumps(results)))
    assert order == ["a", "b", "a"]
    assert found[": b"] == ["it broke"]
    assert len(written) == 3


def test_a_run_reports_the_error_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "HERE", tmp_path)
    (tmp_path / "bad.py").write_text("raise ValueError('3 is not 4')")
    (tmp_path / "good.py").write_text("print({'a': 1}); print('{\"cycle\": 0}')")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    python = Path(sys.executable)
    with pytest.raises(RuntimeError, match=r"^ValueError: 3 is not 4$"):
        compare.run(python, "bad.py", [], False, 60)
    assert compare.run(python, "good.py", [], False, 60) == [{"cycle": 0}]
    with pytest.raises(RuntimeError, match="more than 0 s"):
        compare.run(python, "slow.py", [], False, 0.2)


@pytest.mark.parametrize("job", sorted(compare.PRESETS))
def test_presets_name_known_peers_and_start_with_this_library(job: str) -> None:
    preset = compare.PRESETS[job]
    systems = compare.systems_of(preset, preset.peers)
    assert [system.peer for system in systems[:2]] == ["", ""]
    assert {system.peer for system in systems} - {"", "generate"} <= set(peers.PEERS)
    assert all((compare.HERE / system.script).exists() for system in systems)
    assert len({system.name for system in systems}) == len(systems)


def test_the_order_of_peers_does_not_change_what_they_run() -> None:
    preset = compare.PRESETS["main"]
    found = [compare.systems_of(preset, peers) for peers in (["1.16", "0.4.6"], ["0.4.6", "1.16"])]
    assert sorted(map(str, found[0])) == sorted(map(str, found[1]))


def test_old_format_of_a_folder(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    files: dict[str, Any] = {
        "config.json": {"rope_parameters": {"rope_theta": 5000.0}, "dtype": "bfloat16", "vocab_size": 3},
        "tokenizer_config.json": {"eos_token": "</s>", "tokenizer_class": "TokenizersBackend", "is_local": True},
        "generation_config.json": {},
        "tokenizer.json": {"model": {"merges": [["a", "b"], "c d"], "ignore_merges": False}},
    }
    for name, content in files.items():
        (new / name).write_text(json.dumps(content))
    old = peers.old_format(new, tmp_path / "old")
    read = {path.name: json.loads(path.read_text()) for path in old.glob("*.json")}
    assert read == {
        "config.json": {"rope_theta": 5000.0, "torch_dtype": "float32", "vocab_size": 3},
        "tokenizer_config.json": {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": {"model": {"merges": ["a b", "c d"]}},
    }


def test_requirements_of_a_wheel_leave_out_extras_and_builds_of_torch(tmp_path: Path) -> None:
    lines = ["regex", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio; sys_platform == 'linux'"]
    lines += ["torchcodec>=0.14", "numpy<3,>=1", 'ray; extra == "ray"', "fastapi[standard]>=0.1"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        text = "Metadata-Version: 2.1\n" + "".join(f"Requires-Dist: {line}\n" for line in lines)
        archive.writestr("a-1.dist-info/METADATA", text)
    assert peers.wheel_requirements(tmp_path / "a.whl") == ["regex", "numpy<3,>=1", "fastapi[standard]>=0.1"]


def test_points_of_the_curves() -> None:
    rows = [
        {"cycle": 0, "sample_s": 9.0, "step_s": 9.0},
        {"cycle": 1, "sample_s": 1.0, "step_s": 2.0},
        {"peak_mb": 7.0},
    ]
    line = curves.point({"batch": 4, "new": 2, "cycles": 2}, rows, LLAMA)
    assert (line["sample_ms_per_token"], line["step_ms_per_token"]) == (125.0, 50.0)
    assert 0 < line["step_attention"] < 1
    text = curves.markdown({"batch": [line, {"batch": 1, "new": 1, "failed": "it broke"}]}).splitlines()
    assert text[4].startswith("| 4 | 2 | 125.00 | 50.00 |")
    assert "failed: it broke" in text[5]


def test_curves_are_written_after_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []

    def run(python: Path, script: str, options: list[str], *rest: Any) -> list[dict[str, Any]]:
        runs.append(options)
        if options[options.index("--new") + 1] == "512":
            raise RuntimeError("it broke")
        rows = [
            {"cycle": i, "sample_s": 1.0, "step_s": 2.0} for i in range(int(options[options.index("--cycles") + 1]))
        ]
        return [*rows, {"peak_mb": 1024.0}]

    drawn: list[int] = []
    plot = curves.plot

    def plot_the_last(found: Any, stem: Path) -> None:
        drawn.append(len(runs))
        if len(runs) == 9:
            plot(found, stem)

    monkeypatch.setattr(curves, "run", run)
    monkeypatch.setattr(curves, "plot", plot_the_last)
    monkeypatch.setattr(roofline, "config_of", lambda model, t5: llama_config())
    curves.main(["--out", str(tmp_path), "--cycles", "2"])
    assert len(runs) == 9 and drawn == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (tmp_path / "curves.png").stat().st_size > 0 and (tmp_path / "curves.svg").stat().st_size > 0
    found = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [line["new"] for line in found["memory"]] == [64, 256, 1024]
    assert found["length"][-1] == {"batch": 16, "new": 512, "cycles": 2, "failed": "it broke"}
    assert [line["cold"] for line in found["batch"] + found["memory"]] == [False] * 3 + [True] * 3
    assert "| 16 | 1024 |  |  |" in (tmp_path / "curves.md").read_text()
