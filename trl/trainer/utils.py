"""Helpers that scripts import from `trl.trainer.utils`; `trl.legacy` finds its other old names in their new modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trl import legacy
from trl.core import pad_to_size

if not TYPE_CHECKING:  # type checkers still report unknown names
    __getattr__ = legacy.lookup(__name__)


def pad_to_length(tensor: Tensor, length: int, pad_value: float, dim: int = -1) -> Tensor:
    """Pads the end of dimension `dim` to `length` with `pad_value`; a tensor at least as long is returned unchanged."""
    return tensor if tensor.shape[dim] >= length else pad_to_size(tensor, length, dim, pad_value)


def disable_dropout_in_model(model: nn.Module) -> None:
    """Sets the probability of every `nn.Dropout` in `model` to 0, in training mode too.

    Also sets every float attribute of a module whose name ends with `dropout`, as transformers' attention layers have.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def exact_div(a: int, b: int, *texts: str, custom_error_message: str = "") -> int:
    """Divides `a` by `b`.

    Args:
        a: dividend.
        b: divisor.
        *texts: for the error: a message (TRL 0.9 to 0.11), or the names of `a` and `b`, then a message (0.6 to 0.8).
        custom_error_message: the message, by keyword.

    Raises:
        ValueError: if the division leaves a remainder.
    """
    if a % b == 0:
        return a // b
    names, message = (texts[:2], texts[2:]) if len(texts) > 1 else (("a", "b"), texts)
    reason = "".join(f"{text}: " for text in (*message, custom_error_message) if text)
    raise ValueError(f"{reason}{names[0]}={a} is not a multiple of {names[1]}={b}")
