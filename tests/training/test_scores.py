from __future__ import annotations

import math

import torch

from trl.functional import Moments
from trl.training.scores import ScoreSettings, shape_scores

LARGEST = torch.finfo(torch.float32).max


def test_no_penalty_makes_a_score_infinite_and_ruins_the_moments() -> None:
    settings = ScoreSettings(missing_eos_penalty=LARGEST, scale=True)
    scores, finished = torch.tensor([-LARGEST, 1.0, 2.0]), torch.tensor([False, True, True])
    shaped, moments = shape_scores(scores, finished, Moments(), settings)
    assert torch.isfinite(shaped).all()
    assert moments.count == 3 and math.isfinite(moments.mean) and math.isfinite(moments.squares)
    assert shaped[1] > 0
