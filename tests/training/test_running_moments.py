"""`RunningMoments`: moments of everything so far, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close
from trl.trainer.utils import RunningMoments

ALONE = SimpleNamespace(num_processes=1)


def test_starts_at_a_standard_normal() -> None:
    moments = RunningMoments(ALONE)
    assert (moments.mean, moments.std, moments.var, moments.count) == (0, 1, 1, 1e-24)
    assert moments.accelerator is ALONE


def test_two_batches() -> None:
    moments = RunningMoments(ALONE)
    # 1, 3: mean 2, squares 2
    assert moments.update(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, math.sqrt(2)))
    assert_close([moments.mean, moments.var, moments.std], [2.0, 1.0, math.sqrt(2)])
    # 5, 7, 9: mean 7, squares 8; all: mean 5, squares 16 + 4 + 0 + 4 + 16 = 40
    assert moments.update(torch.tensor([[5.0], [7.0], [9.0]])) == pytest.approx((7.0, 2.0))
    assert_close([moments.mean, moments.var, moments.std], [5.0, 8.0, math.sqrt(10)])
    assert moments.count == pytest.approx(5)


def test_scales_scores_as_scripts_do() -> None:
    moments = RunningMoments(ALONE)
    scores = torch.tensor([1.0, 3.0])
    moments.update(scores)
    scaled = (scores - moments.mean.to(scores.dtype)) / moments.std.to(scores.dtype)
    assert scaled.dtype == torch.float32
    assert_close(scaled, [-math.sqrt(0.5), math.sqrt(0.5)])


def test_one_number_has_no_deviation() -> None:
    moments = RunningMoments(ALONE)
    mean, std = moments.update(torch.tensor([4.0]))
    assert mean == 4 and math.isnan(std)
    assert_close([moments.mean, moments.var, moments.std], [4.0, 0.0, 1.0])


def test_processes_share_their_moments() -> None:
    class TwoAlike:
        """Two processes with the same numbers."""

        num_processes = 2

        def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
            assert reduction == "sum"
            return 2 * tensor

    moments = RunningMoments(TwoAlike())
    # 1, 3, 1, 3: mean 2, squares 4
    assert moments.update(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, math.sqrt(4 / 3)))
    assert moments.count == pytest.approx(4)


def test_goes_on_from_a_file(tmp_path: Path) -> None:
    file = str(tmp_path / "moments.json")
    first, whole = RunningMoments(ALONE), RunningMoments(ALONE)
    first.update(torch.tensor([1.0, 3.0]))
    first.save_to_json(file)
    second = RunningMoments.load_from_json(ALONE, file)
    second.update(torch.tensor([5.0, 7.0, 9.0]))
    whole.update(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]))
    for name in ("mean", "std", "var", "count"):
        assert_close(getattr(second, name), getattr(whole, name), tol=1e-12)
