"""Helpers that scripts import from `trl.trainer.utils`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl.trainer.utils import disable_dropout_in_model, exact_div, pad_to_length


def test_pads_at_the_end_of_the_last_dimension() -> None:
    rows = torch.tensor([[1, 2], [3, 4]])
    assert pad_to_length(rows, 4, 9).tolist() == [[1, 2, 9, 9], [3, 4, 9, 9]]
    assert pad_to_length(rows, 3, 9, dim=0).tolist() == [[1, 2], [3, 4], [9, 9]]
    assert pad_to_length(torch.tensor([0.5]), 2, -1.5).tolist() == [0.5, -1.5]


@pytest.mark.parametrize("length", [1, 2])
def test_returns_what_is_long_enough_as_it_is(length: int) -> None:
    rows = torch.tensor([[1, 2], [3, 4]])
    assert pad_to_length(rows, length, 9) is rows


def test_dropout_is_off_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    disable_dropout_in_model(model)
    assert model.training
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.0, 0.0]
    assert model[0](torch.ones(100)).tolist() == [1.0] * 100


def test_division_without_a_remainder() -> None:
    assert exact_div(12, 4) == 3
    assert exact_div(12, 4, "batch_size", "mini_batch_size", "message") == 3
    assert exact_div(12, 4, "message") == 3


@pytest.mark.parametrize(
    ("texts", "keywords", "message"),
    [
        ((), {}, "a=7 is not a multiple of b=2"),
        (("batch_size", "mini_batch_size"), {}, "batch_size=7 is not a multiple of mini_batch_size=2"),
        (("batch_size", "mini_batch_size", "change one"), {}, "change one: batch_size=7 .* mini_batch_size=2"),
        (("change one",), {}, "change one: a=7 is not a multiple of b=2"),
        ((), {"custom_error_message": "change one"}, "change one: a=7 is not a multiple of b=2"),
    ],
)
def test_division_with_a_remainder(texts: tuple[str, ...], keywords: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        exact_div(7, 2, *texts, **keywords)
