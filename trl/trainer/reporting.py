"""`ReportingTrainer`: computes a step's statistics over all processes and logs them to trackers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.core import convert_to_scalar, stats_to_np
from trl.functional import masked_sum
from trl.redaction import redact
from trl.trackers import completions_table
from trl.trainer.base import BaseTrainer
from trl.training.batch import Batch
from trl.training.processes import gather_over_processes, sum_over_processes
from trl.training.statistics import pooled_mean, step_statistics
from trl.types import ActorCritic, Experience, Tally

logger = logging.getLogger(__name__)


class ReportingTrainer(BaseTrainer):
    """A trainer that reports statistics under the key names of TRL 0.4.6."""

    _trl_stats_prefix = "ppo"
    """Prefix of the statistics."""
    is_distributed: bool
    current_device: torch.device
    current_step = 0
    """Number of calls to `log_stats`."""
    _trl_highest_score: float
    _trl_compared: int
    _trl_scores_of_step: tuple[Tensor, Tensor] | None = None  # [B] of this process and [n · B] of all n processes

    def _trl_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over processes."""
        return sum_over_processes(self.accelerator, tensor)

    def _trl_statistics(
        self, experience: Experience, batch: Batch, kl_coef: float | None, train_stats: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Statistics of a step as numbers and arrays. Every process must call this."""
        mask, sampler_logprobs = experience.rollout.mask, experience.rollout.sampler_logprobs
        penalty = experience.non_score_reward if isinstance(experience, ActorCritic) else None
        stats = self.record_step_stats(
            kl_coef=kl_coef,
            scores=list(experience.scores),
            logprobs=experience.old_logprobs,
            ref_logprobs=experience.ref_logprobs,
            non_score_reward=penalty,
            kls=penalty / -kl_coef if penalty is not None and kl_coef else None,
            train_stats=train_stats,
            masks=mask,
            queries=batch.queries,
            responses=batch.responses,
        )
        if experience.entropy is not None:
            total = Tally(masked_sum(experience.entropy, mask), experience.counted.sum())
            stats["objective/full_entropy"] = pooled_mean(total, self._trl_reduce)
        if sampler_logprobs is not None:
            gap = (experience.old_logprobs - sampler_logprobs).abs()
            stats["objective/sampler_gap"] = pooled_mean(Tally.of(gap, mask), self._trl_reduce)
        all_scores = gather_over_processes(self.accelerator, experience.scores)
        self._trl_scores_of_step = (experience.scores.cpu(), all_scores.cpu())
        return stats_to_np(convert_to_scalar(self.gather_stats(stats)))

    def record_step_stats(self, kl_coef: float | None, **data: Any) -> dict[str, Any]:
        """Computes the statistics of a step. Every process must call this.

        Args:
            kl_coef: KL coefficient used in this step's rewards; None if they include no KL.
            **data: scores, logprobs, ref_logprobs, non_score_reward, kls, masks [B, S], queries, responses, train_stats.

        Returns:
            Statistics by name: scalars cover all processes, arrays only this one.
        """
        scores = data["scores"]
        return step_statistics(
            name=self._trl_stats_prefix,
            kl_coef=kl_coef,
            scores=scores if isinstance(scores, Tensor) else torch.stack(list(scores)).float(),
            logprobs=data["logprobs"],
            ref_logprobs=data["ref_logprobs"],
            non_score_reward=data["non_score_reward"],
            mask=data["masks"].bool(),
            queries=data["queries"],
            responses=data["responses"],
            train_stats=data["train_stats"],
            reduce=self._trl_reduce,
        )

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Averages scalar tensors over processes, such as those you add in `record_step_stats`; arrays stay local."""
        if not self.is_distributed:
            return stats
        names = [k for k, v in stats.items() if isinstance(v, Tensor) and v.dim() == 0]
        packed = torch.stack([stats[name].to(self.current_device).float() for name in names])
        means = self._trl_reduce(packed) / self.accelerator.num_processes
        return stats | dict(zip(names, means, strict=True))

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Logs statistics, score moments and a table of completions to the trackers, on the main process.

        The trackers run on threads of their own: a slow or failing one loses rows, but never stops or delays a
        script. If `rewards` are the scores passed to the last `step`, `env/reward_*` cover all processes. The table
        shows only the main process's completions.

        Args:
            stats: statistics returned by `step`.
            batch: texts by column name. If a column of `columns_to_log` is missing, warns and logs no table.
            rewards: `B` scores.
            columns_to_log: columns shown in the table next to the score.
        """
        if not self.accelerator.is_main_process:
            return
        scores = torch.as_tensor([float(r) for r in rewards])
        logs = dict(stats)
        if missing := [c for c in columns_to_log if c not in batch]:
            warnings.warn(f"the batch has no columns {missing}: no table of completions is logged", stacklevel=2)
        else:
            rows = list(zip(*(batch[c] for c in columns_to_log), scores.tolist(), strict=True))
            logs["game_log"] = completions_table([*columns_to_log, "reward"], rows)
        scores = self._trl_scores_of_all_processes(scores)
        logs["env/reward_mean"] = scores.mean().item()
        logs["env/reward_std"] = scores.std().item() if len(scores) > 1 else 0.0
        logs["env/reward_dist"] = scores.numpy()
        self.current_step += 1
        self.accelerator.log(logs, step=self.current_step)

    def _trl_scores_of_all_processes(self, scores: Tensor) -> Tensor:
        """Scores of all processes `[n · B]`, given this process's `scores` [B], as gathered by `step`.

        Gathering here would hang if a script calls `log_stats` only on the main process.
        """
        if not self.is_distributed:
            return scores
        if self._trl_scores_of_step is not None and torch.equal(scores, self._trl_scores_of_step[0]):
            return self._trl_scores_of_step[1]
        warnings.warn(
            "log_stats was given other rewards than step's scores: env/reward_* cover only the main process",
            stacklevel=3,
        )
        return scores

    def _trl_push_if_best(self, experience: Experience) -> None:
        kwargs = self.config.push_to_hub_if_best_kwargs
        if not kwargs:
            return
        if self._trl_compared % int(self.config.compare_steps or 1) == 0:
            scores = experience.scores.double()  # the sum of finite float32 scores may overflow float32
            mean = float(pooled_mean(Tally.of(scores, experience.counted), self._trl_reduce))
            if mean > self._trl_highest_score:
                try:
                    self.push_to_hub(**kwargs)
                    self._trl_highest_score = mean
                except Exception as error:  # a hub that cannot be reached costs no update
                    logger.warning(
                        "push_to_hub_if_best: the model of mean score %.4g was not uploaded and will be at the next better one: %s",
                        mean, redact(f"{type(error).__name__}: {error}"),
                    )  # fmt: skip
        self._trl_compared += 1
