"""The critic's head: size, start, precision, dropout, and the arguments of TRL 0.4."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers import assert_close
from trl.models import ValueHead
from trl.models.value_head import hidden_size


def config(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(**settings)


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"hidden_size": 24}, 24),
        ({"n_embd": 24}, 24),
        ({"d_model": 24}, 24),
        ({"hidden_size": 32, "word_embed_proj_dim": 24}, 24),  # OPT projects its last state
        ({"text_config": SimpleNamespace(hidden_size=24)}, 24),
        ({"decoder": SimpleNamespace(d_model=24), "encoder": SimpleNamespace(d_model=8)}, 24),
    ],
)
def test_finds_the_width_of_the_last_hidden_state(settings: dict[str, object], width: int) -> None:
    assert hidden_size(config(**settings)) == width
    assert ValueHead(config(**settings)).summary.weight.shape == (1, width)


def test_names_a_configuration_without_a_width() -> None:
    with pytest.raises(ValueError, match="SimpleNamespace defines no hidden size"):
        hidden_size(config(vocab_size=3))


def test_is_one_linear_layer_after_dropout() -> None:
    head = ValueHead(config(hidden_size=3), summary_dropout_prob=0.5).eval()
    with torch.no_grad():
        head.summary.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.summary.bias.fill_(0.25)
    assert isinstance(head.summary, nn.Linear)
    assert_close(head(torch.tensor([[[1.0, 1.0, 2.0], [0.0, 3.0, 0.0]]])), [[[0.25], [-5.75]]])


def test_normal_start_is_that_of_trl_0_4() -> None:
    head = ValueHead(config(hidden_size=4096), v_head_init_strategy="normal", v_head_initializer_range=0.3)
    assert head.summary.bias.item() == 0
    # The standard deviation of 4096 normal numbers is off by 0.3 / sqrt(2 * 4096) = 0.0033 typically.
    assert abs(head.summary.weight.std().item() - 0.3) < 0.015


def test_default_start_does_not_grow_with_the_width() -> None:
    for width in (64, 4096):
        values = ValueHead(config(hidden_size=width)).eval()(torch.randn(512, width))
        assert values.std().item() < 0.2  # 0.1 by construction


@pytest.mark.parametrize(
    ("in_config", "argument", "expected"),
    [
        ({}, None, 0.1),
        ({"summary_dropout_prob": 0.3}, None, 0.3),
        ({"summary_dropout_prob": 0.3}, 0.0, 0.0),
        ({}, 0.25, 0.25),
    ],
)
def test_dropout_of_argument_then_configuration_then_default(
    in_config: dict[str, float], argument: float | None, expected: float
) -> None:
    head = ValueHead(config(hidden_size=4, **in_config), summary_dropout_prob=argument)
    assert head.dropout.p == expected


def test_dropout_drops_in_training_only() -> None:
    head = ValueHead(config(hidden_size=256), summary_dropout_prob=0.5)
    x = torch.randn(4, 256)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"v_head_init_strategy": "xavier"}, "xavier"),
        ({"v_head_initializer_range": -1.0}, "-1.0"),
        ({"v_head_initializer_range": math.nan}, "nan"),
        ({"summary_dropout_prob": 1.5}, "1.5"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ValueHead(config(hidden_size=4), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrowing_the_model_leaves_its_precision(narrow: torch.dtype) -> None:
    trunk = nn.ModuleDict({"layer": nn.Linear(4, 4), "v_head": ValueHead(config(hidden_size=4))})
    before = trunk["v_head"].summary.weight.detach().clone()
    trunk.to(narrow)
    assert trunk["layer"].weight.dtype == narrow
    assert trunk["v_head"].summary.weight.dtype == torch.float32
    assert torch.equal(trunk["v_head"].summary.weight, before)


def test_widening_is_allowed() -> None:
    head = ValueHead(config(hidden_size=4)).double().eval()
    assert head(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_half_precision_states_and_autocast_give_float32_values() -> None:
    head = ValueHead(config(hidden_size=64)).eval()
    x = torch.randn(8, 64).bfloat16()
    exact = x.double() @ head.summary.weight.double().T + head.summary.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(x)
    assert values.dtype == torch.float32
    assert_close(values, exact, 1e-6)
