"""Reports what a `Watch` finds in a managed run: log, events, findings.jsonl, or an error that ends the run."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.redaction import redact
from trl.runs.inputs import RunInputs
from trl.runs.keeper import Keeper
from trl.runs.samples import Drawn, totals
from trl.runs.watching import FirstBatch, UnfitRun, Watch
from trl.trackers import Finding
from trl.trackers.plain import plain
from trl.training.processes import run_together
from trl.training.run_state import Learner
from trl.types import Experience, Scored

logger = logging.getLogger(__name__)


class Observer:
    """Shows the run to a `Watch` and reports each of its findings once, on the main process.

    If the `Watch` raises, only that check is skipped; a failing doctor never ends a run. The first exception is logged.
    """

    def __init__(self, trainer: Learner, watch: Watch, keeper: Keeper) -> None:
        self._trainer, self._watch, self._keeper = trainer, watch, keeper
        self._failures = 0
        self.findings: list[Finding] = []
        """Every finding of the run, including those from before it was resumed; [] except on the main process."""

    def begin(self, step: int, inputs: RunInputs, config: Mapping[str, Any]) -> None:
        """Checks the settings, before the first step after `step`. Every process must call this and `first_batch`.

        Raises:
            UnfitRun: on every process, if a finding is an error.
        """
        self.findings = self._keeper.findings()

        def look() -> list[Finding]:
            rows = [row for row in self._keeper.rows() if row["step"] <= step]
            return self._watch.begin(self._trainer, inputs.prompts, inputs.generation, plain(config), rows)

        self._report(look)

    def first_batch(self, drawn: Drawn, scored: Scored, experience: Experience) -> None:
        """Checks the first batch, before its update; raises as `begin`."""
        batch = FirstBatch(drawn=drawn, scores=totals(scored), experience=experience)
        self._report(lambda: self._watch.first_batch(self._trainer, batch))

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """Checks a step's metrics. Never raises: the trained weights may still be useful."""
        if self._trainer.accelerator.is_main_process:
            self._record(self._findings_of(lambda: self._watch.row({**row, "step": step})))

    def end(self) -> None:
        """Logs a summary of all findings, and how often the doctor failed if it did so more than once."""
        if self._failures > 1:
            logger.warning("the doctor failed %d times in this run", self._failures)
        if self.findings:
            shown = "; ".join(
                f"{finding.code} in step {finding.step}: {finding.title.removesuffix('.')}" for finding in self.findings
            )
            count = f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}"
            logger.warning("the doctor made %s in this run: %s. See docs/doctor.md", count, shown)

    def _report(self, look: Callable[[], list[Finding]]) -> None:
        accelerator = self._trainer.accelerator

        def on_main() -> None:
            findings = self._findings_of(look)
            self._record(findings)
            if errors := [finding for finding in findings if finding.severity == "error"]:
                told = "\n".join(str(finding) for finding in errors)
                raise UnfitRun(f"{told}\nPass doctor=False to train anyway.")

        run_together(accelerator, lambda: on_main() if accelerator.is_main_process else None, UnfitRun)

    def _findings_of(self, look: Callable[[], list[Finding]]) -> list[Finding]:
        """Returns the findings of one check; [] if the doctor raises, which is logged the first time."""
        try:
            return look()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                reason = redact(f"{type(error).__name__}: {error}")
                logger.warning(
                    "the doctor failed (%s); training goes on, and further failures are only counted\n%s",
                    reason, redact(traceback.format_exc().rstrip()),
                )  # fmt: skip
                self._keeper.event(f"the doctor failed: {reason}")
            return []

    def _record(self, findings: Sequence[Finding]) -> None:
        """Reports those findings whose code is new."""
        for finding in findings:
            if all(finding.code != earlier.code for earlier in self.findings):
                self.findings.append(finding)
                logger.log(logging.ERROR if finding.severity == "error" else logging.WARNING, "doctor: %s", finding)
                self._keeper.event(f"doctor: {finding}")
                self._keeper.finding(finding)
