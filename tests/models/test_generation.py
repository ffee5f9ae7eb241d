"""`unwrap_model_for_generation`, as custom loops call it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from torch import nn

from trl.models import unwrap_model_for_generation


@pytest.mark.parametrize("is_peft_model", [True, False])
def test_yields_the_model_inside(is_peft_model: bool) -> None:
    model = nn.Linear(2, 2)
    wrapped = nn.DataParallel(model)
    with unwrap_model_for_generation(wrapped, Accelerator(cpu=True), is_peft_model) as unwrapped:
        assert unwrapped is model


def test_weights_in_parts_are_refused() -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    with pytest.raises(NotImplementedError, match="ZeRO 3"), unwrap_model_for_generation(nn.Linear(2, 2), accelerator):
        pass
