"""Value head: a linear layer from the decoder's last hidden state to a scalar value."""

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
    """Returns the width of the decoder's last hidden state, under whichever name the configuration stores it.

    Raises:
        ValueError: if the configuration has no known width field.
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
        f"{type(config).__name__} defines no hidden size: looked for {', '.join(_WIDTH_NAMES)} "
        f"in it and in its {', '.join(_NESTED_NAMES)}"
    )


class ValueHead(nn.Module):
    """Dropout and a linear layer from hidden states to values; float32 regardless of the trunk's dtype.

    By default weights and bias are drawn from a normal distribution with standard deviation 0.1 / sqrt(hidden size), so
    that the value of a normalised hidden state is near zero. `v_head_init_strategy="normal"` selects TRL 0.4's wider
    initialisation: weights with standard deviation `v_head_initializer_range`, zero bias.

    Args:
        config: the trunk's configuration; its `summary_dropout_prob` is used if it has one.
        summary_dropout_prob: dropout before the linear layer; defaults to the configuration's, else 0.1.
        v_head_init_strategy: None or "normal".
        v_head_initializer_range: standard deviation of the weights under "normal".

    Raises:
        ValueError: for an unknown strategy, a dropout outside [0, 1] or a negative range.
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
            raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r} must be one of {INIT_STRATEGIES}")
        if not v_head_initializer_range >= 0:
            raise ValueError(f"v_head_initializer_range={v_head_initializer_range} must be >= 0")
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", None)
        if summary_dropout_prob is None:
            summary_dropout_prob = DEFAULT_DROPOUT
        if not 0 <= summary_dropout_prob <= 1:
            raise ValueError(f"summary_dropout_prob={summary_dropout_prob} must be in [0, 1]")

        width = hidden_size(config)
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(width, 1, dtype=torch.float32)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)
        else:
            nn.init.normal_(self.summary.weight, std=DEFAULT_GAIN / width**0.5)
            nn.init.normal_(self.summary.bias, std=DEFAULT_GAIN / width**0.5)

    @torch.no_grad()
    def start_from(self, score: nn.Linear) -> None:
        """Copies the score layer of a reward model, so that the value after the last token is the model's reward.

        That holds on the reward model's own trunk; on another trunk, such as the policy's, it is a start for the
        critic.

        Args:
            score: `[1, H]` linear layer, such as `reward_model.score`.

        Raises:
            ValueError: if the layer is not one from the trunk's width to a single number.
        """
        shape, expected = tuple(score.weight.shape), tuple(self.summary.weight.shape)
        if shape != expected:
            raise ValueError(f"the score layer's weight is {shape}, but the value head's is {expected}")
        self.summary.weight.copy_(score.weight)
        if score.bias is None:
            self.summary.bias.zero_()
        else:
            self.summary.bias.copy_(score.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps hidden states [B, T, H] of any dtype to float32 values [B, T, 1]."""
        weight = self.summary.weight
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return self.summary(self.dropout(hidden_states.to(device=weight.device, dtype=weight.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueHead:
        # `.half()`, `.bfloat16()` and `.to(dtype)` of the whole model move the head but keep its precision.
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = tensor.is_floating_point() and result.element_size() < tensor.element_size()
            return tensor.to(device=result.device) if narrowed else result

        return super()._apply(keep_precision, recurse)
