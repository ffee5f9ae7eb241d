"""The managed training loop behind `PPOTrainer.train`: sample, score, learn, record, evaluate, save."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch

from trl.data import Prompt, PromptSampler, column_fingerprints, fingerprint, load_prompts
from trl.functional import masked_mean
from trl.models.limits import context_length
from trl.protocols import Reward
from trl.redaction import redact
from trl.rewards import as_reward
from trl.rewards.compose import budgets_of
from trl.rollout import stop_strings, stop_tokens
from trl.runs.evaluation import evaluate_prompts
from trl.runs.keeper import Keeper
from trl.runs.options import TrainOptions, TrainResult
from trl.runs.progress import NoProgress, Progress, progress_for
from trl.runs.rollback import SpikePolicy
from trl.runs.rows import Clock, Logged, numbers_of
from trl.runs.samples import Drawn, arguments_of_step, draw, judge, records, told_to_all
from trl.runs.signals import SignalWatch, raise_for
from trl.state.checkpoints import Checkpoint
from trl.state.rng import kept_generators
from trl.trackers import CompletionRecord, SafeTracker
from trl.training.processes import check_same, run_together, share_bytes, sum_over_processes
from trl.training.resume import load_training
from trl.training.run_state import Learner, PreparedBatch
from trl.types import Experience, Scored

logger = logging.getLogger(__name__)

_VERSION = 1  # format version of the loop's own state in a checkpoint
_MOST_EMPTY = 3  # consecutive batches without a single score before the run fails


class NothingScored(RuntimeError):
    """Raised when several consecutive batches contain no scored sample."""


def train(trainer: Learner, options: TrainOptions) -> TrainResult:
    """Runs the managed loop; see `PPOTrainer.train`."""
    with SignalWatch() as signals, ExitStack() as stack:
        run = _Run(trainer, options, signals, stack)
        run.begin()
        while not run.stops():
            run.take_step()
        return run.end()


def _values_of(sampler: Callable[[], int] | None) -> list[int]:
    """Lengths that a sampler may draw, if it lists them like `LengthSampler.values`; otherwise []."""
    values = getattr(sampler, "values", None)
    return values if isinstance(values, list) else []


class _Run:
    """State of a run. Every process has one, and all perform the same operations in the same order."""

    def __init__(self, trainer: Learner, options: TrainOptions, signals: SignalWatch, stack: ExitStack) -> None:
        self.trainer, self.options, self.signals, self.stack = trainer, options, signals, stack
        self.accelerator = trainer.accelerator
        self._limit_skips()
        self.started = time.monotonic()
        self.batch_size = int(trainer.config.batch_size) * self.accelerator.num_processes
        self.group_size = int(trainer.config.group_size)
        self.target = options.target(self.batch_size)
        self.generation = options.generation_for(trainer.config.temperature, trainer._stop_tokens())
        self._follow_stops()
        self.prompts = self._load(options.prompts, self._longest_response())
        self.eval_prompts = self._load(options.eval_prompts, int(self.generation["max_new_tokens"]))
        self._check_same_prompts()
        self.length_sampler = self._within_context(options.length_sampler)
        self.sampler = PromptSampler(
            len(self.prompts),
            batch_size=self.batch_size // self.group_size,
            seed=int(trainer.config.seed or 0),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.reward: Reward = as_reward(options.reward)
        stack.callback(self.reward.close)
        self.eval_every = options.evaluates_every(self.batch_size)
        save_every = options.saves_every(self.batch_size)
        check_same(
            self.accelerator,
            {
                "seed": self.sampler.seed,
                "steps": self.target,
                "eval_every": self.eval_every,
                "save_every": save_every,
                "on_spike": options.on_spike,
                "on_disk_error": options.on_disk_error,
            },
        )
        self.keeper = Keeper(trainer, options, save_every)
        stack.callback(self.keeper.close)
        self.spikes = SpikePolicy(trainer, options, self.keeper, save_every or 1)
        self.trackers: list[SafeTracker] = []
        self.progress: Progress = NoProgress()
        self.step = 0
        self.row: dict[str, Any] = {}
        self.counts = {"empty_in_a_row": 0, "skipped_batches": 0}
        self.best_eval = -math.inf
        self.reason = "steps"

    def _limit_skips(self) -> None:
        """Applies `max_skipped_updates` unless the configuration sets its own limit."""
        config, before = self.trainer.config, self.trainer.config.max_skipped_updates
        if before is None:
            config.max_skipped_updates = self.options.max_skipped_updates
            self.stack.callback(setattr, config, "max_skipped_updates", before)

    def _follow_stops(self) -> None:
        """Aligns `config.stop_token_ids`, if unset, with this run's generation settings.

        Otherwise responses ended by those stop tokens would get the missing-eos penalty.

        Raises:
            ValueError: if `missing_eos_penalty` is set and stop strings end responses, which it does not see.
        """
        config, model = self.trainer.config, self.accelerator.unwrap_model(self.trainer.model)
        if config.missing_eos_penalty is not None and (
            strings := stop_strings(model.generation_config, self.generation)
        ):
            raise ValueError(
                f"missing_eos_penalty={config.missing_eos_penalty:g} would be taken off responses that stop_strings={strings} "
                "ended, since their last token is no stop token: leave one of the two out, or end responses by tokens "
                "(generation={'eos_token_id': ...})"
            )
        stops = stop_tokens(model.generation_config, self.generation)
        if config.stop_token_ids is None and set(stops) != set(self.trainer._stop_tokens()):
            config.stop_token_ids = sorted(stops)
            self.stack.callback(setattr, config, "stop_token_ids", None)

    def _load(self, source: Any, tokens: int) -> list[Prompt]:
        """Loads prompts, requiring that each leaves room for `tokens` new tokens in the context."""
        if source is None:
            return []
        model, separate = self.trainer.model, int(self.trainer.is_encoder_decoder)
        context = context_length(model)  # for an encoder-decoder, the decoder's, which includes its start token
        if context is not None and context - tokens < 1:
            what = "its start token" if separate else "a prompt"
            raise ValueError(f"max_new_tokens={tokens} leave no room for {what}: the context holds {context} tokens")
        if separate:
            room = context_length(model, encoder=True)
        else:
            room = None if context is None else context - tokens
        return run_together(
            self.accelerator, lambda: load_prompts(source, self.trainer.tokenizer, max_tokens=room), ValueError
        )

    def _longest_response(self) -> int:
        """Maximum number of new tokens per response, as far as it is known before sampling."""
        sampler = self.options.length_sampler
        if values := _values_of(sampler):
            return max(values)
        longest = self.generation["max_new_tokens"]
        # The range of a custom sampler is unknown; only require that prompts leave room for some response.
        return int(longest if sampler is None else (self.options.generation or {}).get("max_new_tokens", 1))

    def _within_context(self, sampler: Callable[[], int] | None) -> Callable[[], int] | None:
        """Returns the length sampler, capping one of unknown range to the room that the longest prompt leaves.

        Logs a warning the first time the cap applies.
        """
        context = context_length(self.trainer.model)
        if sampler is None or _values_of(sampler) or context is None:
            return sampler
        before = 1 if self.trainer.is_encoder_decoder else max(len(prompt.tokens) for prompt in self.prompts)
        room, said = context - before, False

        def bounded() -> int:
            nonlocal said
            drawn = int(sampler())
            if drawn > room and not said:
                said = True
                logger.warning(
                    "length_sampler drew %d new tokens, but %d tokens before them leave room for %d in the model's context of "
                    "%d: responses end there",
                    drawn, before, room, context,
                )  # fmt: skip
            return min(drawn, room)

        return bounded

    def _check_same_prompts(self) -> None:
        """Checks that all processes hold the same prompts, since each picks its share of a batch by index.

        Raises:
            ValueError: if they differ, for example because a stream was split between processes.
        """
        digest = fingerprint([*self.prompts, *self.eval_prompts]).encode()
        if len(set(share_bytes(self.accelerator, digest))) > 1:
            raise ValueError("the prompts differ between processes: give each of them all prompts, in the same order")

    # Beginning -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepares the run, restoring the newest checkpoint, if any, before any random numbers are drawn."""
        self.stack.push(self._note_error)
        found = None
        if self.keeper.checkpoints is not None and self.options.resume is not False:
            found = load_training(self.trainer, self.keeper.checkpoints, self._differences)
        remarks = [] if found is None else self._take_up(found)
        policy = self.accelerator.unwrap_model(self.trainer.model)
        config = {"ppo": self.trainer.config, "train": self._described(), "model": {"commits": policy.commits}}
        self.keeper.begin(self.step, found.path if found else None, config)
        self.keeper.event(f"from step {self.step} to {self.target}" + (f", from {found.path.name}" if found else ""))
        for remark in remarks:
            logger.warning("resuming %s: %s", self.keeper.path, remark)
            self.keeper.event(remark)
        self._watch_updates()
        self.spikes.begin(self.step, self._extra)
        if self.accelerator.is_main_process:
            self.trackers = [t if isinstance(t, SafeTracker) else SafeTracker(t) for t in self._trackers()]
            self.progress = progress_for(self.options.progress, done=self.step, target=self.target)
        for tracker in self.trackers:
            self.stack.callback(tracker.close)
        self.stack.callback(self.progress.close)
        self._tell("on_start", self.step)

    def _differences(self, checkpoint: Checkpoint) -> list[str]:
        """Reasons why a checkpoint belongs to a different run, apart from those found by the trainer."""
        state = checkpoint.state["extra"].get("run")
        if state is None or state["version"] != _VERSION:
            return ["it was not saved by this version's PPOTrainer.train"]
        found = []
        if state["prompts"] != self._fingerprint:
            found.append("the prompts are not those of the run: their ids or tokens differ")
        if (before := state["sampler"]["seed"]) != self.sampler.seed:
            found.append(f"seed was {before}, is {self.sampler.seed}: the order of the prompts follows from it")
        return found

    def _take_up(self, checkpoint: Checkpoint) -> list[str]:
        """Restores the loop's state from a checkpoint; returns messages about changed data."""
        state = checkpoint.state["extra"]["run"]
        self.sampler.load_state_dict(state["sampler"])
        for budget, seen in zip(
            budgets_of(self.reward), state["budgets"][self.accelerator.process_index], strict=False
        ):
            budget.load_state_dict(seen)
        self.spikes.load_state_dict(state["spikes"], checkpoint.step)
        self.step, self.counts = checkpoint.step, dict(state["counts"])
        self.best_eval = -math.inf if state["best_eval"] is None else state["best_eval"]
        return self._changed_data(state.get("data"))

    def _changed_data(self, before: Mapping[str, Any] | None) -> list[str]:
        """Messages about allowed changes that affect the results: reward columns and held-out prompts."""
        now, found = self._data, []
        for what in now if before is not None else ():
            old, new = (before or {})[what], now[what]
            if names := [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]:
                found.append(f"{what} have changed, and count from here on: {', '.join(names)}")
        return found

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.prompts)

    @cached_property
    def _data(self) -> dict[str, dict[str, str]]:
        """Digests by name, as compared by `_changed_data`."""
        held_out = {"ids and tokens": fingerprint(self.eval_prompts)} if self.eval_prompts else {}
        return {
            "columns of the prompts": column_fingerprints(self.prompts),
            "the held-out prompts": held_out | column_fingerprints(self.eval_prompts),
        }

    def _described(self) -> dict[str, Any]:
        """Options in effect, in a form that can be written to a file; prompts are given by their count."""
        given = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        for name in ("run_dir", "resume", "progress"):  # no effect on the results
            del given[name]
        return given | {
            "prompts": len(self.prompts),
            "eval_prompts": len(self.eval_prompts),
            "steps": self.target,
            "generation": self.generation,
            "eval_every": self.eval_every,
        }

    def _extra(self) -> dict[str, Any]:
        """The loop's own state, for checkpoints."""
        # Tracebacks may contain secrets.
        own = [redact(budget.state_dict()) for budget in budgets_of(self.reward)]
        return {
            "run": {
                "version": _VERSION,
                "prompts": self._fingerprint,
                "data": self._data,
                "sampler": self.sampler.state_dict(),
                "budgets": [json.loads(part) for part in share_bytes(self.accelerator, json.dumps(own).encode())],
                "spikes": self.spikes.state_dict(),
                "counts": self.counts,
                "best_eval": self.best_eval if math.isfinite(self.best_eval) else None,
            }
        }

    def _trackers(self) -> list[Any]:
        logged = [Logged(self.accelerator)] if self.trainer.config.log_with is not None else []
        return [*self.options.trackers, *logged]

    def _watch_updates(self) -> None:
        """Dumps the minibatches of skipped optimizer steps for the duration of this run."""
        guards = self.trainer.guards
        before = guards.on_skip

        def skipped(update: Any) -> None:
            self.keeper.dump(self.step + 1, update)
            if before is not None:
                before(update)

        guards.on_skip = skipped
        self.stack.callback(setattr, guards, "on_skip", before)

    # A step ----------------------------------------------------------------------------------------------------------

    def take_step(self) -> None:
        """Processes one batch of prompts, from sampling to the checkpoint that may follow."""
        clock = Clock()
        drawn = draw(
            self.trainer,
            [self.prompts[index] for index in self.sampler.next() for _ in range(self.group_size)],
            self.generation,
            self.length_sampler,
        )
        clock.lap("sample")
        scored = judge(self.trainer, self.reward, drawn, f"step/{self.step + 1}")
        everyone = told_to_all(self.trainer, scored)
        clock.lap("score")
        stats, prepared = self._learn(drawn, scored, everyone)
        clock.lap("learn")
        self.step += 1
        learnt = f"{self.trainer.name}/loss/total" in stats
        samples = self._records(drawn, scored, None if prepared is None else prepared.experience, learnt=learnt)
        evaluation = self._evaluate()
        clock.lap("eval")
        speed = {
            "time/tokens_per_second": sum(sample.length for sample in samples) / clock.total(),
            "time/samples_per_second": len(samples) / clock.total(),
        }
        self.row = self._row(stats, everyone) | evaluation | clock.laps | speed
        self.keeper.record(self.step, self.row, samples)
        for tracker in self.trackers:
            tracker.log(self.row, self.step)
        self.progress.update(self.step, self.row)
        self._tell_of_step()
        self._save_if_due()

    def _learn(self, drawn: Drawn, scored: Scored, everyone: Scored) -> tuple[dict[str, Any], PreparedBatch | None]:
        """Updates the policy, unless no sample has a score or the batch spikes.

        Returns:
            The step's statistics, and the batch from `PPOTrainer.prepare`, or None if nothing was scored.
        """
        left_out = everyone.scores.count(None)
        if left_out == len(everyone):
            return self._nothing_scored(everyone), None
        self.counts["empty_in_a_row"] = 0
        arguments = arguments_of_step(
            drawn,
            scored,
            leaves_out=left_out > 0,
            token_rewards=any(tokens is not None for tokens in everyone.token_rewards),
            offset=int(self.trainer.is_encoder_decoder),
            group_size=self.group_size,
        )
        prepared = self.trainer.prepare(**arguments)
        why = self.spikes.refuse(prepared.experience)
        if why is not None:
            self.counts["skipped_batches"] += 1
            return self.spikes.declined(self.step + 1, why), prepared
        stats: dict[str, Any] = self.trainer.learn(prepared)
        self.spikes.after_update(self.step + 1, float(stats[f"{self.trainer.name}/loss/total"]))
        return stats, prepared

    def _nothing_scored(self, everyone: Scored) -> dict[str, Any]:
        self.counts["empty_in_a_row"] += 1
        self.counts["skipped_batches"] += 1
        text = f"no sample of step {self.step + 1} has a score: there is nothing to learn from"
        logger.warning(text)
        self.keeper.event(text)
        if self.counts["empty_in_a_row"] >= _MOST_EMPTY:
            error = next((line for line in everyone.errors if line is not None), "the reward returned None")
            raise NothingScored(
                f"no sample of {_MOST_EMPTY} batches in a row has a score; the first of the last: {redact(error)}"
            )
        return {}

    def _records(
        self, drawn: Drawn, scored: Scored, experience: Experience | None, *, learnt: bool
    ) -> list[CompletionRecord]:
        if experience is None:
            return records(self.trainer, drawn, scored)
        kl = None if experience.kl is None else experience.kl.tolist()
        advantages = masked_mean(experience.advantages, experience.rollout.mask, dim=1).tolist() if learnt else None
        return records(self.trainer, drawn, scored, kl=kl, advantages=advantages)

    def _row(self, stats: Mapping[str, Any], everyone: Scored) -> dict[str, Any]:
        """Metrics row of the step."""
        return {
            **numbers_of(stats, everyone),
            "run/epoch": self.sampler.epoch + self.sampler.position / self.sampler.size,
            "run/episodes": self.step * self.batch_size,
            "run/skipped_batches": self.counts["skipped_batches"],
            "run/rollbacks": self.spikes.rollbacks,
        }

    def _evaluate(self) -> dict[str, float]:
        if self.eval_every is None or (self.step % self.eval_every and self.step != self.target):
            return {}
        return evaluate_prompts(self.trainer, self.eval_prompts, self.reward, self.generation)

    def _tell_of_step(self) -> None:
        """Calls `on_step`; a callback on any process may end the run."""
        wishes = self._tell("on_step", self.step, dict(self.row))
        if self._anywhere(any(wish is True for wish in wishes)):
            self.reason = "callback"

    def _tell(self, name: str, *arguments: Any) -> list[Any]:
        """Calls a method of every callback, isolated from the run's random generators.

        A resumed run makes different calls than an uninterrupted one, so callbacks must not advance the generators.
        """

        def told(callback: Any) -> Any:
            with kept_generators(self.accelerator.device, self.trainer._generator):
                return getattr(callback, name)(self.trainer, *arguments)

        if not self.options.callbacks:
            return []
        return run_together(self.accelerator, lambda: [told(callback) for callback in self.options.callbacks])

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        evaluated = self.row.get("eval/score_mean", -math.inf)
        better = evaluated > self.best_eval
        if better:
            self.best_eval = evaluated
        by_the_clock = self.options.save_every is None and self.options.on_spike != "rollback"
        wanted = self.keeper.due(self.step) or (better and by_the_clock and self.keeper.path is not None)
        if self._anywhere(wanted and self.accelerator.is_main_process):
            self._save()
        self.spikes.after_step(self.step)

    def _save(self) -> bool:
        """Saves a checkpoint, ranked by this step's evaluation, or by its batch's mean score in a run without evaluations."""
        if self.keeper.path is None or self.keeper.last_step == self.step:
            return True
        if self.eval_every is not None:
            metric = self.row.get("eval/score_mean")
        else:
            metric = None if self.spikes.went_back else self.row.get("score/mean")
        self.spikes.will_save(self.step)
        path = self.keeper.save(self.step, self._extra(), metric, self.spikes.kept_steps)
        if path is not None:
            self._tell("on_save", self.step, path)
        return path is not None

    def _anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        own = torch.tensor(float(flag), device=self.trainer.current_device)
        return float(sum_over_processes(self.accelerator, own)) > 0

    # The end ---------------------------------------------------------------------------------------------------------

    def stops(self) -> bool:
        """Whether the run is over; the same on every process. A signal to one process stops all of them.

        Raises:
            KeyboardInterrupt: after SIGINT, once the step is saved.
            SystemExit: after SIGTERM, likewise.
        """
        if number := self._signalled():
            self._stop_for(number)
        return self.step >= self.target or self.reason == "callback"

    def _signalled(self) -> int:
        """Signal received by any process; 0 if none."""
        own = str(self.signals.received or 0).encode()
        return max(int(part) for part in share_bytes(self.accelerator, own))

    def _stop_for(self, number: int) -> None:
        name = {2: "SIGINT", 15: "SIGTERM"}.get(number, str(number))
        if self.step > 0:
            self.keeper.insist(self._save)
        self.keeper.finish(self._summary(name), model=False)
        self.keeper.say_last(f"stopped by {name} after step {self.step} of {self.target}")
        raise_for(number)

    def end(self) -> TrainResult:
        """Writes the last checkpoint, the model and the summary, and returns the result."""
        if self.step > 0:
            self.keeper.insist(self._save)
        self.keeper.finish(self._summary(self.reason), model=True)
        self.keeper.say_last(f"ended after step {self.step} of {self.target}: {self.reason}")
        last, best = self.keeper.kept
        result = TrainResult(
            steps=self.step,
            episodes=self.step * self.batch_size,
            reason=self.reason,
            last=last,
            best=best,
            run_dir=self.keeper.path,
            seconds=time.monotonic() - self.started,
            metrics=self.row,
        )
        self._tell("on_end", result)
        if number := self._signalled():
            raise_for(number)
        return result

    def _summary(self, reason: str) -> dict[str, Any]:
        return {
            "reason": reason,
            "steps": self.step,
            "target": self.target,
            "episodes": self.step * self.batch_size,
            "run/skipped_batches": self.counts["skipped_batches"],
            "run/rollbacks": self.spikes.rollbacks,
            "time/seconds": time.monotonic() - self.started,
        }

    def _note_error(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Logs the exception that ended the run to the events."""
        if isinstance(error, Exception):
            self.keeper.event(f"failed in step {self.step + 1}: {type(error).__name__}: {error}")
        return False
