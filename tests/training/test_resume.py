"""A run that was interrupted ends as the one that was not, to the bit; and another run is told from it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.setting import language_model, make_batch, make_trainer, with_value_head
from tests.helpers import assert_close, tiny_gpt2, tiny_tokenizer
from tests.training.runs import CASES, advance, begin, build, fingerprint
from trl import AutoModelForCausalLMWithValueHead, PPOTrainer
from trl.kernels.door import kernels_enabled
from trl.state.checkpoints import load_checkpoint
from trl.state.encoding import decode, encode, no_tensors
from trl.state.fingerprints import Fingerprints

ROOT = Path(__file__).parents[2]


# The same to the bit -------------------------------------------------------------------------------------------------


def test_17_39_new_processes_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Two steps, a save, another process that knows nothing, two steps: four steps, bit for bit.

    Weights, optimizer, scheduler, KL coefficient, running moments, generators, and every number of the statistics, with
    dropout on, for each way to train.
    """
    straight = {}
    for case in CASES:
        trainer = begin(case)
        rows = advance(trainer, 2)
        trainer.save_checkpoint(tmp_path / case)
        rows += advance(trainer, 2)
        straight[case] = {"rows": rows[2:], "end": fingerprint(trainer)}
        assert len({row["objective/kl_coef"] for row in rows}) == 4  # the controller is alive
        assert trainer.score_moments.count == 16
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.runs", str(tmp_path), *CASES],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case, line in zip(CASES, done.stdout.splitlines(), strict=True):
        resumed = json.loads(line)
        assert resumed["rows"] == straight[case]["rows"], case
        assert resumed["end"] == straight[case]["end"], case


@pytest.mark.parametrize("k", [0, 1, 3])
def test_39_wherever_the_run_is_cut(tmp_path: Path, k: int) -> None:
    trainer = begin("lora")
    trainer.save_checkpoint(tmp_path / "start")
    rows = advance(trainer, 3)
    end = fingerprint(trainer)
    first = build("lora", chance=5)
    first.load_checkpoint(tmp_path / "start")
    found = advance(first, k)
    first.save_checkpoint(tmp_path / "cut", extra={"prompt": 4 * k})
    second = build("lora", chance=6)
    loaded = second.load_checkpoint(tmp_path / "cut")
    assert loaded is not None and loaded.state["extra"] == {"prompt": 4 * k} and loaded.step == k
    assert found + advance(second, 3 - k) == rows
    assert fingerprint(second) == end


def test_r17_the_same_seed_gives_the_same_numbers_and_saving_changes_none(tmp_path: Path) -> None:
    first = begin("full", seed=3)
    rows, end = advance(first, 2), fingerprint(first)
    second = begin("full", seed=3)
    again = advance(second, 1)
    second.save_checkpoint(tmp_path)
    assert again + advance(second, 1) == rows
    assert fingerprint(second) == end
    assert advance(begin("full", seed=4), 2) != rows


def test_only_what_is_trained_is_stored_of_a_model_with_an_adapter(tmp_path: Path) -> None:
    trainer = begin("lora")
    advance(trainer, 1)
    path = trainer.save_checkpoint(tmp_path)
    loaded = build("lora").load_checkpoint(tmp_path)
    assert loaded is not None and loaded.path == path
    names = set(loaded.tensors("policy"))
    assert names == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("v_head" in name for name in names) and any("lora_A" in name for name in names)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


def test_a_trainer_takes_nothing_from_an_empty_folder(tmp_path: Path) -> None:
    trainer = begin("full")
    before = fingerprint(trainer)
    assert trainer.load_checkpoint(tmp_path) is None
    assert fingerprint(trainer) == before


# R7: another run -----------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, case: str = "full", **settings: Any) -> Path:
    trainer = begin(case, **settings)
    advance(trainer, 1)
    trainer.save_checkpoint(tmp_path)
    return tmp_path


def refuses(trainer: Any, folder: Path, message: str) -> None:
    before = fingerprint(trainer)
    with pytest.raises(
        ValueError, match=rf"is a checkpoint of another run: .*{message}.*\. To go on with that run, start as"
    ):
        trainer.load_checkpoint(folder)
    assert fingerprint(trainer) == before


def test_r7_another_batch_size_is_refused(tmp_path: Path) -> None:
    refuses(build("full", batch_size=8), saved(tmp_path), "batch_size was 4, is 8")


def test_r7_another_optimizer_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "plain sgd")
    refuses(
        build("full"),
        folder,
        r"scheduler_class was .*MultiStepLR, is .*CosineAnnealingLR; the optimizer was a torch\.optim\.sgd\.SGD, is a .*AdamW",
    )


def test_r7_another_adapter_is_refused(tmp_path: Path) -> None:
    refuses(build("full"), saved(tmp_path, "lora"), "the policy lacks .*lora_A.* and 1 more; the policy has additional")


def test_r7_another_base_model_is_refused(tmp_path: Path) -> None:
    """Under an adapter nothing would fail: the adapter would quietly stand on other weights."""
    folder = saved(tmp_path, "lora")
    trainer = build("lora")
    with torch.no_grad():
        trainer.model.pretrained_model.base_model.model.transformer.wte.weight[3, 2] += 1e-3
    refuses(
        trainer,
        folder,
        r"the base model has other weights in pretrained_model\.base_model\.model\.transformer\.wte\.weight",
    )


def test_r7_another_reference_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    trainer = build("full")
    with torch.no_grad():
        trainer.ref_model.pretrained_model.transformer.h[0].mlp.c_fc.bias[0] += 1e-3
    refuses(
        trainer,
        folder,
        r"the reference model has other weights in pretrained_model\.transformer\.h\.0\.mlp\.c_fc\.bias",
    )


def test_r7_another_shape_and_another_tokenizer_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "lora")
    monkeypatch.setattr("tests.training.runs.tiny_gpt2", lambda **kw: tiny_gpt2(**kw | {"n_embd": 32}))
    trainer = build("lora")
    trainer.tokenizer.add_tokens(["new"])
    refuses(
        trainer, folder, r"tokenizer_size was 61, is 62; the policy \(was F32 \[4, 16\], is F32 \[4, 32\]\) differs in "
    )


def test_r7_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    found = load_checkpoint(folder)
    assert found is not None
    other = replace(found, state=dict(found.state) | {"processes": 2})
    monkeypatch.setattr("trl.training.resume.load_checkpoint", lambda folder: other)
    refuses(build("full"), folder, "processes was 2, is 1")


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """`begin("full")` after two steps, saved before settings were kept by group, and the rows of the next two steps.

    To rounding, not to the bit: another processor may have written it. Dropout draws by the shape of its input, which in the
    recorded update was that of a packed row: of padded rows, what comes before the first update is compared.
    """
    folder = shutil.copytree(Path(__file__).with_name("data") / "before_0_5", tmp_path / "before")
    trainer = build("full", chance=1)
    assert trainer.load_checkpoint(folder) is not None
    recorded = json.loads((folder / "rows.json").read_text())
    if not kernels_enabled():
        recorded = [
            {name: value for name, value in recorded[0].items() if name.startswith(("objective/", "ppo/returns"))}
        ]
    assert all(len(expected) > 5 for expected in recorded)
    for row, expected in zip(advance(trainer, len(recorded)), recorded, strict=True):
        for name, value in expected.items():
            assert_close(row[name], value)


def test_a_class_that_has_moved_since_is_known_by_its_old_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "narrow moments")
    found = load_checkpoint(folder)
    assert found is not None
    optimizer = found.state["optimizer"] | {"class": "trl.training.streaming.NarrowAdam"}
    older = replace(found, state=dict(found.state) | {"optimizer": optimizer})
    monkeypatch.setattr("trl.training.resume.load_checkpoint", lambda folder: older)
    assert build("narrow moments").load_checkpoint(folder) is not None


def test_r7_settings_are_the_users_and_their_changes_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, "lora", learning_rate=1e-2)
    trainer = build("lora", learning_rate=5e-3, cliprange=0.3, seed=4)
    with caplog.at_level(logging.WARNING):
        trainer.load_checkpoint(folder)
    assert "settings have changed; the new values are used: learning_rate was 0.01, is 0.005" in caplog.text
    assert "cliprange was 0.2, is 0.3" in caplog.text
    assert "the optimizer was built with lr=0.01, now with 0.005: the new value is used" in caplog.text
    assert "the new seed has no effect" in caplog.text
    assert trainer.optimizer.param_groups[0]["lr"] == 5e-3
    assert trainer.config.cliprange == 0.3


def test_a_rate_that_the_optimizer_does_not_take_is_not_said_to_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lowered on the configuration of a run, the rate goes on where the trainer is made with the first one again."""
    trainer = build("lora", learning_rate=1e-2)
    trainer.config.learning_rate = 1e-4
    advance(trainer, 1)
    trainer.save_checkpoint(tmp_path)
    other = build("lora", learning_rate=1e-2)
    with caplog.at_level(logging.WARNING):
        other.load_checkpoint(tmp_path)
    (row,) = advance(other, 1)
    assert row["ppo/learning_rate"] == 1e-4
    assert "learning_rate was 0.0001, is 0.01, which has no effect: the optimizer continues at 0.0001" in caplog.text
    assert "the new values are used" not in caplog.text


def grouped(head_rate: float, **trunk: Any) -> PPOTrainer:
    """A trainer whose optimizer has a group for the trunk, at the default rate of 1e-3, and one for the value head."""
    model = with_value_head(language_model())
    optimizer = torch.optim.Adam(
        [
            {"params": model.pretrained_model.parameters(), **trunk},
            {"params": model.v_head.parameters(), "lr": head_rate},
        ],
        lr=1e-3,
    )
    return make_trainer(model=model, optimizer=optimizer)


def test_settings_of_a_group_are_the_users_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = grouped(1e-2)
    trainer.step(*make_batch())
    trainer.save_checkpoint(tmp_path)
    other = grouped(5e-2, weight_decay=0.1)
    with caplog.at_level(logging.WARNING):
        other.load_checkpoint(tmp_path)
    assert [group["lr"] for group in other.optimizer.param_groups] == [1e-3, 5e-2]
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0]
    assert "group 0 of the optimizer was built with weight_decay=0, now with 0.1: the new value is used" in caplog.text
    assert "group 1 of the optimizer was built with lr=0.01, now with 0.05: the new value is used" in caplog.text


def test_a_rate_that_was_changed_by_hand_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Made with the same rate as before, the optimizer keeps what a loop of the user's own had made of it."""
    trainer = grouped(1e-2)
    trainer.step(*make_batch())
    trainer.optimizer.param_groups[1]["lr"] = 3e-3
    trainer.save_checkpoint(tmp_path)
    other = grouped(1e-2)
    with caplog.at_level(logging.WARNING):
        other.load_checkpoint(tmp_path)
    assert [group["lr"] for group in other.optimizer.param_groups] == [1e-3, 3e-3]
    assert "was built with" not in caplog.text


def test_r7_a_schedule_goes_on_even_if_its_start_was_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = begin("full")
    advance(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    rate = trainer.optimizer.param_groups[0]["lr"]
    other = build("full")
    other.optimizer.param_groups[0]["lr"] = 1.0
    other.load_checkpoint(tmp_path)
    assert other.optimizer.param_groups[0]["lr"] == rate != 1e-2
    assert "the scheduler's saved state takes precedence" in caplog.text


def test_r7_a_fixed_coefficient_is_a_setting(tmp_path: Path) -> None:
    folder = saved(tmp_path, "lora", adap_kl_ctrl=False, init_kl_coef=0.2)
    for coefficient in (0.2, 0.4):
        trainer = build("lora", adap_kl_ctrl=False, init_kl_coef=coefficient)
        trainer.load_checkpoint(folder)
        assert trainer.kl_ctl.value == coefficient


def test_r7_other_versions_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("trl.state.checkpoints.versions", lambda: {"torch": "1.0"})
    folder = saved(tmp_path, "lora")
    build("lora").load_checkpoint(folder)
    assert f"may differ in rounding from an uninterrupted run: torch was 1.0, is {torch.__version__}" in caplog.text


def test_no_secret_of_the_settings_is_stored(tmp_path: Path) -> None:
    secrets = {
        "tracker_kwargs": {"key": "canary-1"},
        "push_to_hub_if_best_kwargs": {"repo_id": "a/b", "token": "canary-2"},
    }
    trainer = build("lora", **secrets)
    path = trainer.save_checkpoint(tmp_path)
    assert all(b"canary" not in file.read_bytes() for file in path.iterdir())


# The parts -----------------------------------------------------------------------------------------------------------


def test_state_survives_json_exactly() -> None:
    from collections import Counter

    value = {
        "floats": [0.1 + 0.2, 1e-320, float("inf"), -0.0],
        "tuple": (1, (2, None), [True]),
        3: "three",
        "counter": Counter({2: 1}),
        "__tuple__": "not one",
        "tensor": torch.tensor([1.5]),
        "big": 2**80,
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "x", tensors), allow_nan=False)
    back = decode(json.loads(text), tensors.__getitem__)
    assert list(tensors) == ["x/tensor"] and back.pop("tensor") is value.pop("tensor")
    assert back == value and repr(back) == repr(value)
    assert type(back["counter"]) is Counter
    with pytest.raises(
        ValueError, match=r"scheduler/0/f is a builtin_function_or_method, which a checkpoint cannot store"
    ):
        encode([{"f": len}], "scheduler", {})
    with pytest.raises(ValueError, match="found a tensor at x/tensor"):
        decode(json.loads(text), no_tensors)


def test_fingerprints_see_every_change_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    from trl.state import fingerprints

    real = fingerprints.tensor_bytes
    monkeypatch.setattr(fingerprints, "tensor_bytes", lambda tensor: seen.append(1) or real(tensor))
    one, two = torch.zeros(3), torch.zeros(3)
    prints = Fingerprints()
    first = prints.of("a", {"x": one, "y": two})
    assert prints.of("a", {"x": one, "y": two}) == first and len(seen) == 2
    two[1] = 1
    second = prints.of("a", {"x": one, "y": two})
    assert second["x"] == first["x"] and second["y"] != first["y"] and len(seen) == 3
    assert prints.of("b", {"x": one.to(torch.int32)})["x"] != first["x"]
    assert prints.of("b", {"x": one.reshape(1, 3)})["x"] != first["x"]


def test_an_optimizer_of_foreign_parameters_cannot_be_saved(tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    from trl import PPOConfig, PPOTrainer

    foreign = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(2, 7))], lr=0.1)
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, None, tiny_tokenizer(), optimizer=foreign)
    with pytest.raises(ValueError, match=r"group 0 of the optimizer holds a parameter of shape \(2, 7\)"):
        trainer.save_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
