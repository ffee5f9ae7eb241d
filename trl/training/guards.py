"""Guards of the update: skipping non-finite steps and shrinking the microbatch when memory runs out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from trl.types import Experience

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many consecutive optimizer steps were skipped because the loss or gradient was not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedUpdate:
    """An optimizer step skipped by every process."""

    experience: Experience | None  # this process's minibatch, advantages as the loss used them; None if unknown
    grad_norm: float  # on this process; may be finite if the loss or another process's gradient was not
    in_a_row: int  # consecutive skipped steps, including this one
    reason: str
    counts: bool = True  # False for a step that is skipped by design: its minibatch is finite


@dataclass(kw_only=True)
class UpdateGuards:
    """Counts skipped steps, and remembers the largest microbatch that fits into memory."""

    max_skipped: int | None = None  # consecutive skipped steps that end the run; None: no limit
    on_skip: Callable[[SkippedUpdate], None] | None = None  # called for every skipped step, on every process
    consecutive_skips: int = 0
    largest_microbatch: int | None = None  # None until memory runs out

    def stepped(self) -> None:
        """Records a completed step."""
        self.consecutive_skips = 0

    def skipped(self, norm: float, reason: str, experience: Experience | None, counts: bool = True) -> None:
        """Records a step skipped on every process.

        Args:
            norm: gradient norm on this process.
            reason: why it was skipped.
            experience: the minibatch of the gradient.
            counts: whether it counts towards `max_skipped`; False for what is by design: a loss-scaler overflow, or a
                refusal.

        Raises:
            NonFiniteError: at `max_skipped` skipped steps in a row.
        """
        self.consecutive_skips += int(counts)
        warnings.warn(
            f"{reason}: this optimizer step is skipped and the weights are unchanged. Check the scores, the learning "
            "rate and ppo/policy/ratio.",
            stacklevel=3,
        )
        if self.on_skip is not None:
            self.on_skip(
                SkippedUpdate(
                    experience=experience,
                    grad_norm=norm,
                    in_a_row=self.consecutive_skips,
                    reason=reason,
                    counts=counts,
                )
            )
        if counts and self.max_skipped is not None and self.consecutive_skips >= self.max_skipped:
            raise NonFiniteError(
                f"{self.consecutive_skips} optimizer steps in a row were skipped "
                f"(max_skipped_updates={self.max_skipped}); the last because {reason}"
            )

    def microbatch(self, configured: int) -> int:
        """Microbatch size to use: the configured size, capped at the largest that fits."""
        return configured if self.largest_microbatch is None else min(configured, self.largest_microbatch)

    def halve_microbatch(self, size: int) -> None:
        """Halves the microbatch after `size` sequences (at least 2) ran out of memory."""
        self.largest_microbatch = size // 2
        logger.warning(
            "out of memory with a microbatch of %d: reducing it to %d; minibatches stay the same",
            size,
            size // 2,
        )
