"""`ResumableTrainer`: managed runs and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from trl.doctor import DoctorWatch
from trl.functional import Moments
from trl.functional.intervals import mean_estimate
from trl.protocols import Callback, Tracker
from trl.runs.comparison import Comparison, compare
from trl.runs.inputs import check_same_prompts, load_run_prompts
from trl.runs.managed import train
from trl.runs.options import (
    OnDiskError,
    OnSpike,
    TrainOptions,
    TrainResult,
    check_generation,
    generation_for,
)
from trl.runs.spikes import SpikeSettings
from trl.runs.watching import NoWatch
from trl.state.checkpoints import Checkpoint
from trl.state.fingerprints import Fingerprints
from trl.trackers import SafeTracker
from trl.trainer.policy_sampler import PolicySampler
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.reporting import ReportingTrainer
from trl.trainer.tracking import NamedTracker
from trl.training.guards import UpdateGuards
from trl.training.resume import load_training, save_training


class ResumableTrainer(ReportingTrainer):
    """A trainer whose runs can be managed, saved and resumed: a `trl.training.run_state.RunState`."""

    config: PPOConfig
    optimizer: Any
    lr_scheduler: Any
    ref_model: Any
    kl_ctl: Any
    _trl_score_moments: Moments
    _trl_guards: UpdateGuards
    _trl_fingerprints: Fingerprints
    _trl_generator: torch.Generator
    _trl_optimizer_made_with: list[dict[str, Any]]
    _trl_sampler: PolicySampler
    _trl_highest_score: float
    _trl_compared: int

    def train(
        self,
        prompts: Any,
        *,
        reward: Any,
        steps: int | None = None,
        episodes: int | None = None,
        run_dir: str | Path | None = None,
        resume: bool | Literal["auto"] = False,
        generation: Mapping[str, Any] | None = None,
        length_sampler: Callable[[], int] | None = None,
        eval_prompts: Any = None,
        eval_every: int | None = None,
        save_every: int | None = None,
        keep_last: int = 2,
        keep_best: bool = True,
        on_spike: OnSpike | None = "warn",
        spike: SpikeSettings | None = None,
        max_skipped_updates: int | None = 3,
        on_disk_error: OnDiskError = "stop",
        callbacks: Sequence[Callback] = (),
        trackers: Sequence[Tracker] = (),
        progress: bool | None = None,
        launch: Mapping[str, Any] | None = None,
        doctor: bool = True,
    ) -> TrainResult:
        """Runs the full training loop (sample, score, learn), keeping records and checkpoints in a run folder.

        Each step takes `config.batch_size` prompts per process. docs/runs.md describes the folder and which failures a
        run survives.

        Args:
            prompts: anything `trl.data.load_prompts` accepts.
            reward: anything `trl.rewards.as_reward` accepts. Samples without a score are excluded from the update.
            steps: total steps of the run, including those before a resumption.
            episodes: total samples over all processes, as an alternative to `steps`; rounded up to whole steps.
            run_dir: run folder; None writes nothing.
            resume: "auto" resumes the run in `run_dir` or starts a new one; True requires an existing run; False
                requires that there is no run yet. A run whose checkpoints were deleted cannot be resumed.
            generation: arguments of `generate`. By default, up to 64 new tokens from the distribution that the update
                scores.
            length_sampler: draws `max_new_tokens`, as in `generate`.
            eval_prompts: held-out prompts, sampled and scored like the others, with the same random numbers each time.
            eval_every: steps between evaluations; by default 20 evaluations per run. The model before the first step
                and the last one are always evaluated.
            save_every: steps between checkpoints. None saves as often as keeps the cost below 1% of the run time, at
                least every half hour, and after each new best evaluation. The last step is always saved.
            keep_last: number of recent checkpoints to keep.
            keep_best: also keep the best checkpoint, by `eval/score_mean`, or by `score/mean` without `eval_prompts`.
            on_spike: response to a spike in KL or loss. "warn" logs it; "skip" skips the batch (KL only, which is known
                before the update); "rollback" returns to the newest checkpoint due by `save_every` (by default 20 per
                run) and continues with the next prompts; None ignores it.
            spike: thresholds that define a spike.
            max_skipped_updates: consecutive non-finite optimizer steps before the run fails;
                `config.max_skipped_updates`, if set, takes precedence.
            on_disk_error: "stop" ends the run; "go_on" retries failed writes later.
            callbacks: see `trl.protocols.Callback`.
            trackers: see `trl.protocols.Tracker`. A tracker that fails or hangs loses its rows but never stops the run.
            progress: None shows a bar on a terminal (with rich) and plain lines elsewhere; False shows nothing.
            launch: how the run was started, kept under `launch` in config.resolved.yaml; `trl resume` reads it.
            doctor: look at the settings, the first batch and every row of metrics for signs that the run cannot train
                well (docs/doctor.md). Findings are logged, and written to the events and to findings.jsonl; they change
                no number.

        Raises:
            ValueError: if an argument is invalid, or `run_dir` holds a different run.
            CheckpointError: if no checkpoint can be read, or one cannot be written.
            OSError: if a record cannot be written.
            UnfitRun: before the first update, if the doctor finds that the run cannot train correctly.
            NonFiniteError: after `max_skipped_updates` consecutive non-finite optimizer steps.
            SpikeError: if spikes persist after three consecutive batches were skipped or rolled back.
            KeyboardInterrupt: on SIGINT, after the current step is finished and saved; a second SIGINT raises at once.
            SystemExit: on SIGTERM, likewise, with status 143.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "doctor")}
        self._trl_check_trainable()
        options = TrainOptions(**arguments, watch=DoctorWatch() if doctor else NoWatch())
        return train(self, options)  # type: ignore[arg-type]  # a Learner, by its subclasses

    def evaluate(
        self,
        prompts: Any,
        reward: Any,
        *,
        generation: Mapping[str, Any] | None = None,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> Comparison:
        """Compares the trained policy with its base, the reference, on the same prompts with the same random numbers.

        Changes nothing: neither the run's random generators, nor the models' modes. With several processes, every
        process must call it. An algorithm without a reference is evaluated alone, and `Comparison.base` is None.

        Args:
            prompts: anything `trl.data.load_prompts` accepts, preferably held out from training.
            reward: anything `trl.rewards.as_reward` accepts, not only the reward of the training. Prompts on which a
                function fails or returns None are excluded and counted; a reward that is already built keeps its own
                way with failures.
            generation: arguments of `generate`, as for `train`.
            seed: seed of the random numbers; the same seed gives the same responses.
            confidence: coverage of the intervals. Student's t for means, paired for the difference; Wilson's score
                interval for the win rate. They hold for prompts drawn from the same source as these.

        Returns:
            Mean scores, their paired difference, win rate, KL, lengths, and every prompt with both responses. `str` of
            it is a table, `to_dict()` plain JSON.

        Raises:
            ValueError: if an argument is invalid.
            NothingScored: if no prompt has a score.
        """
        check_generation(generation)
        mean_estimate([], confidence)  # rejects an invalid confidence before sampling
        trainer: Any = self  # a Learner, by its subclasses
        arguments = generation_for(generation, self.config.temperature, trainer._trl_stop_tokens())
        loaded = load_run_prompts(trainer, prompts, int(arguments["max_new_tokens"]))
        if not loaded:
            raise ValueError(f"prompts={prompts!r}: an evaluation needs at least one prompt")
        check_same_prompts(trainer, loaded)
        return compare(trainer, loaded, reward, arguments, seed=seed, confidence=confidence)

    def _trl_open_trackers(self, folder: Path | None, step: int, settings: Mapping[str, Any]) -> list[SafeTracker]:
        """Starts the trackers of `config.log_with` for a managed run, on the main process."""
        trackers = [tracker for tracker in self.accelerator.trackers if isinstance(tracker, NamedTracker)]
        return [tracker.begin_run(folder, step, settings) for tracker in trackers]

    def _trl_check_trainable(self) -> None:
        """Raises ValueError if a subclass overrides a method that a managed run does not call."""

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State that a run carries between steps, apart from model, optimizer and scheduler."""
        return {
            "kl_ctl": self.kl_ctl.state_dict(),
            "score_moments": asdict(self._trl_score_moments),
            "minibatch_order": self._trl_generator.get_state(),
            "steps_done": self._trl_steps_done,
            "logged_steps": self.current_step,
            "highest_score": self._trl_highest_score,
            "compared": self._trl_compared,
            "consecutive_skips": self._trl_guards.consecutive_skips,
            "largest_microbatch": self._trl_guards.largest_microbatch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._trl_sampler.weights_changed()
        self.kl_ctl.load_state_dict(state["kl_ctl"])
        self._trl_score_moments = Moments(**state["score_moments"])
        self._trl_generator.set_state(state["minibatch_order"])
        self._trl_steps_done = state["steps_done"]
        self.current_step = state["logged_steps"]
        self._trl_highest_score = state["highest_score"]
        self._trl_compared = state["compared"]
        self._trl_guards.consecutive_skips = state["consecutive_skips"]
        self._trl_guards.largest_microbatch = state["largest_microbatch"]

    def save_checkpoint(
        self,
        folder: str | Path,
        *,
        extra: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        metric: float | None = None,
    ) -> Path:
        """Saves everything needed to resume training. Call it on every process, between two calls to `step`.

        Args:
            folder: checkpoint folder of this run; must be shared by all processes.
            extra: your own JSON-serialisable data, such as a position in the dataset; `load_checkpoint` returns it in
                `.state["extra"]`.
            keep_last: number of recent checkpoints to keep, besides the one with the highest metric.
            metric: quality of this checkpoint; higher is better.

        Returns:
            Path of the new checkpoint.

        Raises:
            CheckpointError: if the checkpoint could not be written; the previous one is intact.
        """
        return save_training(self, folder, step=self._trl_steps_done, extra=extra, keep_last=keep_last, metric=metric)

    def load_checkpoint(self, folder: str | Path) -> Checkpoint | None:
        """Restores the newest intact checkpoint in a folder. Call it on every process, before anything else.

        On the same machine with the same libraries and settings, training continues exactly as it would have without
        the interruption: bit for bit in float32 on a CPU (docs/runs.md gives the exact guarantee).

        Returns:
            The checkpoint, or None, with nothing changed, if the folder holds no checkpoint.

        Raises:
            ValueError: if the checkpoint belongs to a different run; each difference is named and nothing is changed.
            CheckpointError: if there are checkpoints but none can be read.
        """
        return load_training(self, folder)
