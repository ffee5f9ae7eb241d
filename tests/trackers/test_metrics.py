from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trl.trackers import read_metrics, without_times
from trl.trackers.metrics import metrics_line


def test_line_worked_by_hand() -> None:
    row = {
        "a": 1,
        "b": np.float32(0.5),
        "c": torch.tensor([2.0]),
        "d": np.array(3),
        "bad": float("nan"),
        "worse": np.float64("-inf"),
        "flag": True,
        "text": "left out",
        "array": np.zeros(2),
        "none": None,
    }
    expected = '{"step": 7, "a": 1, "b": 0.5, "c": 2.0, "d": 3, "bad": null, "worse": null, "flag": 1, '
    assert metrics_line(row, 7) == expected + '"nonfinite": ["bad", "worse"]}'
    assert metrics_line({"step": 7}, 7) == '{"step": 7}'


def test_floats_read_back_to_the_bit() -> None:
    values = {str(i): x for i, x in enumerate(np.random.default_rng(0).standard_normal(200).tolist())}
    values |= {"small": 5e-324, "large": 1.7976931348623157e308, "minus": -0.0}
    read = json.loads(metrics_line(values, 0))
    assert {key: x.hex() for key, x in values.items()} == {key: read[key].hex() for key in values}


@pytest.mark.parametrize(
    ("row", "step", "reason"),
    [
        ({"step": 3}, 2, "metrics row of step 2 uses the reserved key 'step'"),
        ({"nonfinite": 1}, 2, "key 'nonfinite'"),
        ({}, -1, "step=-1"),
        ({}, True, "step=True"),
        ({}, 1.0, "step=1.0"),
    ],
)
def test_bad_rows(row: dict[str, float], step: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        metrics_line(row, step)


def test_reading_stops_at_what_a_dying_machine_left(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    rows = b'{"step": 1, "a": 0.5}\n{"step": 2}\n'
    for tail in (b"", b'{"step": 3', b'{"step": 3\n', b"\0\0\0\0", b"\0\n\xff\n{}\n3\n"):
        path.write_bytes(rows + tail)
        assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5}, {"step": 2}]
    path.write_bytes(b'{"step": 1}\n{"st\xffp": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics row, although valid rows follow it"):
        read_metrics(tmp_path)


def test_without_times() -> None:
    row = {"step": 1, "loss": None, "time/a": 0.1, "time/b": None, "nonfinite": ["loss", "time/b"]}
    assert without_times(row) == {"step": 1, "loss": None, "nonfinite": ["loss"]}
    assert without_times({"step": 1, "memory/peak_mb": 512.0}) == {"step": 1}
    assert without_times({"step": 1, "time/b": None, "nonfinite": ["time/b"]}) == {"step": 1}
