"""`unwrap_model_for_generation`, as custom loops of TRL 0.8 to 0.11 call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unwrap_model_for_generation(model: Any, accelerator: Any, is_peft_model: bool = False) -> Iterator[Any]:
    """Yields the model inside what accelerate wrapped around it (DDP, `torch.compile`).

    Args:
        model: a model, possibly prepared by `accelerator`.
        accelerator: an `accelerate.Accelerator`.
        is_peft_model: changes nothing: the adapter takes part either way, as in TRL.

    Raises:
        NotImplementedError: under DeepSpeed ZeRO 3, where each process holds a part of every weight.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise NotImplementedError(
            "unwrap_model_for_generation does not gather the weights of DeepSpeed ZeRO 3: use ZeRO 2, or put "
            "deepspeed.zero.GatheredParameters(model.parameters()) around it"
        )
    yield accelerator.unwrap_model(model)
