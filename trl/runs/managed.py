"""The managed training loop behind `PPOTrainer.train`: sample, score, learn, record, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from typing import Any

import torch

from trl import startup
from trl.data import PromptSampler
from trl.functional import masked_mean
from trl.protocols import Reward
from trl.redaction import redact
from trl.rewards import as_reward
from trl.rewards.compose import budgets_of
from trl.runs.evaluation import NothingScored, evaluate_prompts
from trl.runs.inputs import RunInputs, run_settings
from trl.runs.keeper import Keeper
from trl.runs.loop_state import LoopState
from trl.runs.observer import Observer
from trl.runs.options import TrainOptions, TrainResult
from trl.runs.progress import NoProgress, Progress, progress_for
from trl.runs.rollback import SpikePolicy
from trl.runs.rows import Clock, scalars_of
from trl.runs.samples import Drawn, draw, gather_records, gather_scored, prepare_arguments, score_samples, totals
from trl.runs.signals import SignalWatch, raise_for
from trl.runs.token_records import token_records
from trl.state.rng import preserved_generators
from trl.trackers import CompletionRecord, SafeTracker
from trl.trackers.completions import records_table
from trl.training.processes import check_same, run_together, share_json, sum_over_processes
from trl.training.resume import load_training
from trl.training.run_state import Learner
from trl.types import Experience, Scored

logger = logging.getLogger(__name__)

_SHOWN_COMPLETIONS = 8  # samples in a tracker's table
_MAX_EMPTY_BATCHES = 3  # consecutive batches without a single score before the run fails


def train(trainer: Learner, options: TrainOptions) -> TrainResult:
    """Runs the managed loop; see `PPOTrainer.train`."""
    with SignalWatch(announce=options.progress is not False) as signals, ExitStack() as stack:
        run = _Run(trainer, options, signals, stack)
        run.begin()
        while not run.is_over():
            run.take_step()
        return run.end()


class _Run:
    """A managed run. Every process has one, and all perform the same operations in the same order."""

    def __init__(self, trainer: Learner, options: TrainOptions, signals: SignalWatch, stack: ExitStack) -> None:
        self.trainer, self.options, self.signals, self.stack = trainer, options, signals, stack
        self.accelerator = trainer.accelerator
        self.started = time.monotonic()
        generation = options.generation_for(trainer.config.temperature, trainer._trl_stop_tokens())
        stack.enter_context(run_settings(trainer, options, generation))
        self.inputs = inputs = RunInputs.load(trainer, options, generation)
        sampler = PromptSampler(
            len(inputs.prompts),
            batch_size=inputs.batch_size // inputs.group_size,
            seed=int(trainer.config.seed or 0),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.reward: Reward = as_reward(options.reward)
        stack.callback(self.reward.close)
        check_same(
            self.accelerator,
            {
                "seed": sampler.seed,
                "steps": inputs.target,
                "eval_every": inputs.eval_every,
                "save_every": inputs.save_every,
                "on_spike": options.on_spike,
                "on_disk_error": options.on_disk_error,
            },
        )
        self.keeper = Keeper(trainer, options, inputs.save_every)
        stack.callback(self.keeper.close)
        self.spikes = SpikePolicy(trainer, options, self.keeper, inputs.save_every or 1)
        self.observer = Observer(trainer, options.watch, self.keeper)
        self.state = LoopState(
            accelerator=self.accelerator,
            inputs=inputs,
            sampler=sampler,
            budgets=budgets_of(self.reward),
            spikes=self.spikes,
        )
        self.trackers: list[SafeTracker] = []  # given to `train`: numbers alone
        self.named_trackers: list[SafeTracker] = []  # of `config.log_with`: numbers, and tables of completions
        self.progress: Progress = NoProgress()
        self.row: dict[str, Any] = {}
        self.reason = "steps"

    # The start -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepares the run, restoring the newest checkpoint, if any, before any random numbers are drawn."""
        self.stack.push(self._record_failure)
        checkpoint, state = None, self.state
        if self.keeper.checkpoints is not None and self.options.resume is not False:
            checkpoint = load_training(self.trainer, self.keeper.checkpoints, state.differences)
        remarks = [] if checkpoint is None else state.restore(checkpoint)
        policy = self.accelerator.unwrap_model(self.trainer.model)
        train_options = self.inputs.resolved(self.options)
        config = {
            "ppo": self.trainer.config,
            "algorithm": self.trainer._trl_choices,
            "train": train_options,
            "model": {"commits": policy.commits},
        }
        if self.options.launch is not None:
            config["launch"] = self.options.launch
        self.keeper.begin(state.step, None if checkpoint is None else checkpoint.path, config)
        source = "" if checkpoint is None else f", from {checkpoint.path.name}"
        self.keeper.event(f"from step {state.step} to {self.inputs.target}{source}")
        for remark in remarks:
            logger.warning("resuming %s: %s", self.keeper.path, remark)
            self.keeper.event(remark)
        self.observer.begin(state.step, self.inputs, config)
        self._dump_skipped_updates()
        self.spikes.begin(state.step, state.extra)
        if self.accelerator.is_main_process:
            self.trackers = [t if isinstance(t, SafeTracker) else SafeTracker(t) for t in self.options.trackers]
            self.named_trackers = self.trainer._trl_open_trackers(
                self.keeper.path, state.step, {"algorithm": config["algorithm"], "train": train_options}
            )
            self.progress = progress_for(self.options.progress, done=state.step, target=self.inputs.target)
            on_cpu = self.accelerator.device.type == "cpu"
            if on_cpu and (note := startup.spinning_note(torch.get_num_threads())) is not None:
                logger.warning("%s", note)
        for tracker in (*self.trackers, *self.named_trackers):
            self.stack.callback(tracker.close)
        self.stack.callback(self.progress.close)
        self._call_back("on_start", state.step)

    def _dump_skipped_updates(self) -> None:
        """Dumps the minibatches of skipped optimizer steps for the duration of this run."""
        guards = self.trainer._trl_guards
        before = guards.on_skip

        def on_skip(update: Any) -> None:
            if update.counts:
                self.keeper.dump(self.state.step + 1, update)
            else:
                self.keeper.event(f"optimizer step of step {self.state.step + 1} skipped: {update.reason}")
            if before is not None:
                before(update)

        guards.on_skip = on_skip
        self.stack.callback(setattr, guards, "on_skip", before)

    # A step ----------------------------------------------------------------------------------------------------------

    def take_step(self) -> None:
        """Processes one batch of prompts, from sampling to the checkpoint that may follow."""
        clock, inputs, state = Clock(), self.inputs, self.state
        untrained = self._evaluate_untrained() if state.step == 0 else {}
        clock.lap("eval")
        prompts = [inputs.prompts[index] for index in state.sampler.next() for _ in range(inputs.group_size)]
        drawn = draw(self.trainer, prompts, inputs.generation, inputs.length_sampler)
        clock.lap("sample")
        scored = score_samples(self.trainer, self.reward, drawn, f"step/{state.step + 1}")
        all_scored = gather_scored(self.accelerator, scored)
        clock.lap("score")
        stats, experience = self._learn(drawn, scored, all_scored)
        clock.lap("learn")
        state.step += 1
        records = self._records(
            drawn, scored, experience, trained=f"{self.trainer._trl_stats_prefix}/loss/total" in stats
        )
        evaluation = untrained | self._evaluate()
        clock.lap("eval")
        self.row = scalars_of(stats, all_scored, records) | self._counts() | evaluation | clock.times(records)
        self.keeper.record(state.step, self.row, records)
        self.observer.row(state.step, self.row)
        for tracker in self.trackers:
            tracker.log(self.row, state.step)
        shown = self.row | self._shown_completions(records)
        for tracker in self.named_trackers:
            tracker.log(shown, state.step)
        self.progress.update(state.step, self.row)
        answers = self._call_back("on_step", state.step, dict(self.row))
        if self._on_any_process(any(answer is True for answer in answers)):
            self.reason = "callback"
        self._save_if_due()

    def _learn(self, drawn: Drawn, scored: Scored, all_scored: Scored) -> tuple[dict[str, Any], Experience | None]:
        """Updates the policy, unless no sample has a score or the batch spikes.

        Returns:
            The step's statistics, and the batch's experience, or None if nothing was scored.
        """
        unscored = all_scored.scores.count(None)
        if unscored == len(all_scored):
            self._skip_unscored(all_scored)
            return {}, None
        self.state.empty_in_a_row = 0
        arguments = prepare_arguments(
            drawn,
            scored,
            masks=unscored > 0,
            token_rewards=any(tokens is not None for tokens in all_scored.token_rewards),
            offset=int(self.trainer.is_encoder_decoder),
            group_size=self.inputs.group_size,
        )
        prepared = self.trainer._trl_prepare(**arguments)
        if self.state.step == 0:
            self.observer.first_batch(drawn, scored, prepared.experience)
        step, reason = self.state.step + 1, self.spikes.reason_to_skip(prepared.experience)
        if reason is not None:
            self.state.skipped_batches += 1
            return self.spikes.skip(step, reason), prepared.experience
        stats = self.trainer._trl_learn(prepared)
        self.spikes.after_update(step, float(stats[f"{self.trainer._trl_stats_prefix}/loss/total"]))
        return stats, prepared.experience

    def _skip_unscored(self, all_scored: Scored) -> None:
        """Counts a batch without a single score.

        Raises:
            NothingScored: after too many in a row.
        """
        self.state.empty_in_a_row += 1
        self.state.skipped_batches += 1
        message = f"no sample of step {self.state.step + 1} has a score: skipping the update"
        logger.warning(message)
        self.keeper.event(message)
        if self.state.empty_in_a_row >= _MAX_EMPTY_BATCHES:
            error = next((error for error in all_scored.errors if error is not None), "the reward returned None")
            raise NothingScored(
                f"{_MAX_EMPTY_BATCHES} batches in a row have no scored sample; first error of the last batch: {redact(error)}"
            )

    def _records(
        self, drawn: Drawn, scored: Scored, experience: Experience | None, *, trained: bool
    ) -> list[CompletionRecord]:
        if experience is None:
            return gather_records(self.accelerator, drawn, scored)
        kl = None if experience.kl is None else experience.kl.tolist()
        advantages = masked_mean(experience.advantages, experience.rollout.mask, dim=1).tolist() if trained else None
        tokens = token_records(self.trainer.tokenizer, experience, totals(scored))
        return gather_records(self.accelerator, drawn, scored, kl=kl, advantages=advantages, tokens=tokens)

    def _counts(self) -> dict[str, Any]:
        sampler = self.state.sampler
        return {
            "run/epoch": sampler.epoch + sampler.position / sampler.size,
            "run/episodes": self.state.step * self.inputs.batch_size,
            "run/skipped_batches": self.state.skipped_batches,
            "run/rollbacks": self.spikes.rollbacks,
        }

    def _shown_completions(self, records: list[CompletionRecord]) -> dict[str, Any]:
        """A table of some of the step's samples for trackers, at the steps of evaluations, or 20 times per run."""
        every = self.inputs.eval_every or max(1, self.inputs.target // 20)
        if not self.named_trackers or (self.state.step % every and self.state.step != self.inputs.target):
            return {}
        return {"completions": records_table(records, _SHOWN_COMPLETIONS)}

    def _evaluate(self) -> dict[str, float]:
        inputs, step = self.inputs, self.state.step
        if inputs.eval_every is None or (step % inputs.eval_every and step != inputs.target):
            return {}
        return evaluate_prompts(self.trainer, inputs.eval_prompts, self.reward, inputs.eval_generation)

    def _evaluate_untrained(self) -> dict[str, float]:
        """An evaluation before the first step, under keys of its own: what the later ones are compared with."""
        inputs = self.inputs
        if inputs.eval_every is None:
            return {}
        result = evaluate_prompts(self.trainer, inputs.eval_prompts, self.reward, inputs.eval_generation)
        self.progress.update(0, result)
        return {key.replace("eval/", "eval_before/", 1): value for key, value in result.items()}

    def _call_back(self, name: str, *arguments: Any) -> list[Any]:
        """Calls a method of every callback, isolated from the run's random generators.

        A resumed run makes different calls than an uninterrupted one, so callbacks must not advance the generators.
        """

        def call(callback: Any) -> Any:
            with preserved_generators(self.accelerator.device, self.trainer._trl_generator):
                return getattr(callback, name)(self.trainer, *arguments)

        if not self.options.callbacks:
            return []
        return run_together(self.accelerator, lambda: [call(callback) for callback in self.options.callbacks])

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        score = self.row.get("eval/score_mean", -math.inf)
        new_best = score > self.state.best_eval
        if new_best:
            self.state.best_eval = score
        by_the_clock = self.options.save_every is None and self.options.on_spike != "rollback"
        due = self.keeper.due(self.state.step) or (new_best and by_the_clock and self.keeper.path is not None)
        if self._on_any_process(due and self.accelerator.is_main_process):
            self._save()
        self.spikes.after_step(self.state.step)

    def _save(self) -> bool:
        """Saves a checkpoint, ranked by this step's evaluation, or without evaluations by its batch's mean score."""
        step = self.state.step
        if self.keeper.path is None or self.keeper.last_step == step:
            return True
        if self.inputs.eval_every is not None:
            metric = self.row.get("eval/score_mean")
        else:
            metric = None if self.spikes.rolled_back else self.row.get("score/mean")
        self.spikes.before_save(step)
        path = self.keeper.save(step, self.state.extra(), metric, self.spikes.protected_steps)
        if path is not None:
            self._call_back("on_save", step, path)
        return path is not None

    def _on_any_process(self, flag: bool) -> bool:
        local_flag = torch.tensor(float(flag), device=self.trainer.current_device)
        return float(sum_over_processes(self.accelerator, local_flag)) > 0

    # The end ---------------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Whether the run is over; the same on every process. A signal to one process stops all of them.

        Raises:
            KeyboardInterrupt: after SIGINT, once the step is saved.
            SystemExit: after SIGTERM, likewise.
        """
        if number := self._signal():
            self._stop_for(number)
        return self.state.step >= self.inputs.target or self.reason == "callback"

    def _signal(self) -> int:
        """Signal received by any process; 0 if none."""
        return max(share_json(self.accelerator, self.signals.received or 0))

    def _stop_for(self, number: int) -> None:
        name = {2: "SIGINT", 15: "SIGTERM"}.get(number, str(number))
        self._finish(name, f"stopped by {name} after step {self.state.step} of {self.inputs.target}", model=False)
        raise_for(number)

    def end(self) -> TrainResult:
        """Writes the last checkpoint, the model and the summary, and returns the result."""
        event = f"ended after step {self.state.step} of {self.inputs.target}: {self.reason}"
        self._finish(self.reason, event, model=True)
        last, best = self.keeper.newest_and_best()
        result = TrainResult(
            steps=self.state.step,
            episodes=self.state.step * self.inputs.batch_size,
            reason=self.reason,
            last=last,
            best=best,
            run_dir=self.keeper.path,
            seconds=time.monotonic() - self.started,
            metrics=self.row,
            findings=tuple(self.observer.findings),
        )
        self._call_back("on_end", result)
        if number := self._signal():
            raise_for(number)
        return result

    def _finish(self, reason: str, event: str, *, model: bool) -> None:
        """Writes the last checkpoint, the summary and the last event, insisting that they reach the disk."""
        if self.state.step > 0:
            self.keeper.insist(self._save)
        summary = {
            "reason": reason,
            "steps": self.state.step,
            "target": self.inputs.target,
            "episodes": self.state.step * self.inputs.batch_size,
            "run/skipped_batches": self.state.skipped_batches,
            "run/rollbacks": self.spikes.rollbacks,
            "findings": [finding.code for finding in self.observer.findings],
            "time/seconds": time.monotonic() - self.started,
        }
        self.keeper.finish(summary, save_model=self.trainer.save_pretrained if model else None)
        self.keeper.insist_on_event(event)
        self.observer.end()

    def _record_failure(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Logs the exception that ended the run to the events."""
        if isinstance(error, Exception):
            self.keeper.failed(self.state.step + 1, error, target=self.inputs.target)
        return False
