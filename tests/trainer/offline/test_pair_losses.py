from __future__ import annotations

import math

import pytest
import torch

from tests.functional.oracles import f64
from tests.helpers import assert_close
from trl.trainer.offline.pair_losses import (
    LOSSES,
    WITHOUT_REFERENCE,
    PairLogprobs,
    PairSettings,
    check_loss_types,
    combined,
)

PAIRS = PairLogprobs(
    chosen=f64([-4.0, -6.0]),
    rejected=f64([-5.0, -3.0]),
    chosen_tokens=torch.tensor([2, 3]),
    rejected_tokens=torch.tensor([5, 1]),
    ref_chosen=f64([-4.5, -5.0]),
    ref_rejected=f64([-4.0, -3.5]),
)
SETTINGS = PairSettings(beta=0.2, smoothing=0.1, simpo_gamma=0.3)
RATIOS = [(0.5, -1.0), (-1.0, 0.5)]  # log π/π_ref of chosen and rejected, by hand
PER_TOKEN = [(0.25, -0.2), (-1 / 3, 0.5)]
PLAIN = [(-2.0, -1.0), (-2.0, -3.0)]  # log π per token


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float) -> float:
    return -0.9 * math.log(sigma(x)) - 0.1 * math.log(sigma(-x))


def odds(x: float) -> float:
    return math.exp(x) / (1 - math.exp(x))


EXPECTED = {
    "sigmoid": [smoothed(0.2 * (w - m)) for w, m in RATIOS],
    "sigmoid_norm": [smoothed(0.2 * (w - m)) for w, m in PER_TOKEN],
    "robust": [
        (-0.9 * math.log(sigma(0.2 * (w - m))) + 0.1 * math.log(sigma(-0.2 * (w - m)))) / 0.8 for w, m in RATIOS
    ],
    "hinge": [max(0.0, 1 - 0.2 * (w - m)) for w, m in RATIOS],
    "ipo": [(w - m - 2.5) ** 2 for w, m in PER_TOKEN],
    "apo_zero": [1 - sigma(0.2 * w) + sigma(0.2 * m) for w, m in RATIOS],
    "apo_down": [sigma(0.2 * w) + 1 - sigma(0.2 * (w - m)) for w, m in RATIOS],
    "simpo": [-math.log(sigma(0.2 * (w - m) - 0.3)) for w, m in PLAIN],
    "sft": [2.0, 2.0],
    "odds_ratio": [-math.log(sigma(math.log(odds(w) / odds(m)))) for w, m in PLAIN],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_hand(name: str) -> None:
    assert_close(LOSSES[name](PAIRS, SETTINGS), f64(EXPECTED[name]), 1e-9)


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE))
def test_losses_without_a_reference_do_not_read_it(name: str) -> None:
    pairs = PairLogprobs(
        chosen=PAIRS.chosen,
        rejected=PAIRS.rejected,
        chosen_tokens=PAIRS.chosen_tokens,
        rejected_tokens=PAIRS.rejected_tokens,
        ref_chosen=f64([math.nan] * 2),
        ref_rejected=f64([math.nan] * 2),
    )
    assert_close(LOSSES[name](pairs, SETTINGS), f64(EXPECTED[name]), 1e-9)


def test_orpo_is_imitation_plus_weighted_odds() -> None:
    expected = [a + 0.1 * b for a, b in zip(EXPECTED["sft"], EXPECTED["odds_ratio"], strict=True)]
    assert_close(combined(PAIRS, SETTINGS, ["sft", "odds_ratio"], [1.0, 0.1]), f64(expected), 1e-9)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "loss_type is empty"),
        (
            ["sigmoid", "aot"],
            "loss_type='aot' is a loss of TRL that is not supported: expected one or several of sigmoid",
        ),
        (["sigmoyd"], "loss_type='sigmoyd' is unknown"),
    ],
)
def test_names_that_are_no_loss(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_loss_types(names)
