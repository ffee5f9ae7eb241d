"""Every number that TRL 1.16 logs in DPO, KTO and reward modelling, in three steps of each loss, is ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import assert_close

pytest.importorskip("datasets")

from tests.trainer.offline import parity_job


@pytest.mark.parity
def test_logs_are_those_of_trl_1_16() -> None:
    golden = json.loads((Path(__file__).parent / "data/trl_1_16.json").read_text())
    ours = parity_job.runs(own=True)
    assert ours.keys() == golden.keys()
    for case, rows in golden.items():
        assert len(ours[case]) == len(rows) == 3
        for row, expected in zip(ours[case], rows, strict=True):
            assert expected.keys() <= row.keys(), case
            for key, number in expected.items():
                assert_close(row[key], number, 2e-5)
