"""`DoctorWatch`: the doctor's look at a managed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.data import Prompt, load_prompts
from trl.doctor.batch_checks import Look, check_batch
from trl.doctor.row_checks import RowChecks
from trl.doctor.setting_checks import check_settings
from trl.runs.watching import FirstBatch
from trl.trackers.findings import Finding
from trl.training.run_state import Learner
from trl.types import ActorCritic


class DoctorWatch:
    """A `trl.runs.watching.Watch` that makes every check of this package. Draws nothing and changes nothing."""

    def __init__(self) -> None:
        self._rows = RowChecks({})
        self._of_settings: list[Finding] = []

    def begin(
        self,
        trainer: Learner,
        prompts: Sequence[Prompt],
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
    ) -> list[Finding]:
        """Looks at models and settings, and at the rows of steps already done."""
        self._rows = RowChecks(config, expects_end=expects_end(trainer, prompts, generation))
        self._of_settings = check_settings(trainer, prompts, generation)
        return [*self._of_settings, *(found for row in rows for found in self._rows.see(row))]

    def first_batch(self, trainer: Learner, batch: FirstBatch) -> list[Finding]:
        """Looks at the first batch, before its update."""
        experience = batch.experience
        look = Look(
            queries=batch.drawn.queries,
            responses=batch.drawn.responses,
            mask=experience.rollout.mask,
            logprobs=experience.old_logprobs,
            ref_logprobs=experience.ref_logprobs,
            entropy=experience.entropy,
            values=experience.old_values if isinstance(experience, ActorCritic) else None,
            scores=batch.scores,
            groups=experience.rollout.group.tolist(),
            fresh=trainer._trl_steps_done == 0,
        )
        return unexplained(check_batch(trainer, look), self._of_settings)

    def row(self, row: Mapping[str, Any]) -> list[Finding]:
        """Looks at the metrics of a step."""
        return self._rows.see(row)


def unexplained(of_batch: Sequence[Finding], of_settings: Sequence[Finding]) -> list[Finding]:
    """The findings of a batch that do not merely show what a setting already explains."""
    reshaped = any(found.code in ("temperature-mismatch", "sampling-reshaped") for found in of_settings)
    return [found for found in of_batch if not (reshaped and found.code == "sampler-mismatch")]


def expects_end(trainer: Learner, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> bool:
    """Whether responses are meant to end before the limit: they end at stop strings, or the prompts are chats."""
    if generation.get("stop_strings"):
        return True
    if not getattr(trainer.tokenizer, "chat_template", None):
        return False
    try:
        (chat,) = load_prompts([[{"role": "user", "content": "?"}]], trainer.tokenizer)
    except ValueError:  # a template that wants another chat
        return False
    opening = chat.text.partition("?")[2]
    return bool(opening) and any(prompt.text.endswith(opening) for prompt in prompts)
