"""The critic: one linear map from a decoder's last hidden state to a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_DROPOUT = 0.1
DEFAULT_GAIN = 0.1
INIT_STRATEGIES = (None, "normal")

# OPT projects its last hidden state to `word_embed_proj_dim`, so that name comes before `hidden_size`.
_WIDTH_NAMES = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim")
_NESTED_NAMES = ("text_config", "decoder", "language_config", "llm_config")


def hidden_size(config: Any) -> int:
    """Width of the decoder's last hidden state, whatever its configuration calls it.

    Raises:
        ValueError: if the configuration names no width.
    """
    for name in _WIDTH_NAMES:
        width = getattr(config, name, None)
        if isinstance(width, int) and not isinstance(width, bool) and width > 0:
            return width
    for name in _NESTED_NAMES:
        nested = getattr(config, name, None)
        if nested is not None and not isinstance(nested, (str, int, float, dict)):
            return hidden_size(nested)
    raise ValueError(
        f"{type(config).__name__} names no hidden size: looked for {', '.join(_WIDTH_NAMES)} "
        f"there and in {', '.join(_NESTED_NAMES)}"
    )


class ValueHead(nn.Module):
    """Dropout and a linear layer from hidden states to values, in float32 whatever the trunk computes in.

    By default the weights and the bias are normal with a standard deviation of 0.1 / sqrt(hidden size), so that a
    normalised hidden state has a value near zero. `v_head_init_strategy="normal"` is the wider start of TRL 0.4:
    weights normal with `v_head_initializer_range`, bias zero.

    Args:
        config: the trunk's configuration; a `summary_dropout_prob` in it is honoured.
        summary_dropout_prob: dropout before the linear layer; by default the configuration's, else 0.1.
        v_head_init_strategy: None or "normal".
        v_head_initializer_range: standard deviation of the "normal" weights.

    Raises:
        ValueError: for an unknown strategy, a dropout outside [0, 1] or a range below 0.
    """

    def __init__(
        self,
        config: Any,
        *,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        if v_head_init_strategy not in INIT_STRATEGIES:
            raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r} is none of {INIT_STRATEGIES}")
        if not v_head_initializer_range >= 0:
            raise ValueError(f"v_head_initializer_range={v_head_initializer_range} must be >= 0")
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", None)
        if summary_dropout_prob is None:
            summary_dropout_prob = DEFAULT_DROPOUT
        if not 0 <= summary_dropout_prob <= 1:
            raise ValueError(f"summary_dropout_prob={summary_dropout_prob} must lie in [0, 1]")

        width = hidden_size(config)
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(width, 1, dtype=torch.float32)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)
        else:
            nn.init.normal_(self.summary.weight, std=DEFAULT_GAIN / width**0.5)
            nn.init.normal_(self.summary.bias, std=DEFAULT_GAIN / width**0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [B, T, H] of any dtype to float32 values [B, T, 1]."""
        weight = self.summary.weight
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return self.summary(self.dropout(hidden_states.to(device=weight.device, dtype=weight.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueHead:
        # `.half()`, `.bfloat16()` and `.to(dtype)` of the whole model move the head but leave its precision.
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = tensor.is_floating_point() and result.element_size() < tensor.element_size()
            return tensor.to(device=result.device) if narrowed else result

        return super()._apply(keep_precision, recurse)
