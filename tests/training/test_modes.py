"""Evaluation mode is switched on for a block, module by module."""

from __future__ import annotations

import pytest
from torch import nn

from trl.training.modes import eval_mode


def test_every_submodule_gets_its_own_mode_back() -> None:
    first, second = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)), nn.Sequential(nn.Dropout())
    first[0].eval()
    modules = [*first.modules(), *second.modules()]
    before = [module.training for module in modules]
    assert before == [True, False, True, True, True]
    with eval_mode(first, second):
        assert not any(module.training for module in modules)
    assert [module.training for module in modules] == before
    with pytest.raises(ZeroDivisionError), eval_mode(first):
        raise ZeroDivisionError
    assert [module.training for module in modules] == before


def test_a_model_in_evaluation_mode_stays_there() -> None:
    model = nn.Sequential(nn.Dropout()).eval()
    with eval_mode(model, model):
        pass
    assert not any(module.training for module in model.modules())
