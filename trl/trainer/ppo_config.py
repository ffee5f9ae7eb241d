"""The settings of `PPOTrainer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from trl.trackers.plain import plain

KL_PENALTIES = ("kl", "abs", "mse", "k3", "full")
LOSS_DENOMINATORS = ("minibatch", "batch")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class PPOConfig:
    """Settings of a run. A value that is changed after the trainer was made counts from the next call on, or gives a warning."""

    task_name: str | None = None
    """Name of the task, for trackers."""
    model_name: str | None = None
    """Name of the model, for scripts and trackers."""
    steps: int | None = 20000
    """Samples the run is planned for; `total_ppo_epochs` follows from it, nothing else."""
    learning_rate: float | None = 1e-5
    """Of the default optimizer, Adam."""
    adap_kl_ctrl: bool | None = True
    """Adapt the KL coefficient to `target`; otherwise it stays at `init_kl_coef`."""
    init_kl_coef: float | None = 0.2
    """First (or fixed) weight of the KL penalty."""
    target: float | None = 6
    """KL per sequence that the adaptive controller steers to, in nats."""
    horizon: float | None = 10000
    """Samples over which the adaptive controller reacts."""
    gamma: float | None = 1
    """Discount, 0 to 1."""
    lam: float | None = 0.95
    """λ of generalised advantage estimation, 0 to 1."""
    cliprange: float | None = 0.2
    """The policy's ratio is clipped to 1 ± this."""
    cliprange_value: float | None = 0.2
    """A value is held within ± this of its old one."""
    vf_coef: float | None = 0.1
    """Weight of the value loss."""
    batch_size: int | None = 256
    """Samples per call of `step`, on each process."""
    forward_batch_size: int | None = None
    """The old name of `mini_batch_size`."""
    mini_batch_size: int | None = 1
    """Samples per forward and backward pass."""
    gradient_accumulation_steps: int | None = 1
    """Passes per optimizer step: it sees `mini_batch_size * gradient_accumulation_steps` samples, however they are cut."""
    ppo_epochs: int | None = 4
    """Optimisation passes over each batch."""
    remove_unused_columns: bool | None = True
    """Drop the columns of a `datasets.Dataset` that neither the model nor the trainer names."""
    log_with: str | None = None
    """A tracker that accelerate knows: "wandb", "tensorboard", ..."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """For the tracker."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """For `accelerate.Accelerator`."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """For `accelerate.utils.ProjectConfiguration`, such as `logging_dir`."""
    tracker_project_name: str = "trl"
    """Name of the project at the tracker."""
    max_grad_norm: float | None = None
    """Clip the gradient's norm to this, once per optimizer step."""
    seed: int | None = 0
    """Of Python's, NumPy's and torch's generators and of the order of minibatches."""
    optimize_cuda_cache: bool = False
    """Empty the accelerator's cache at the end of each step of this trainer."""
    early_stopping: bool = False
    """End a batch's optimisation once `ppo/policy/policykl` exceeds 1.5 `target_kl`."""
    target_kl: float | None = 0.1
    """For early stopping, in nats per token."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `push_to_hub` (at least `repo_id`): upload whenever the mean score is the best so far."""
    compare_steps: int | None = 1
    """Steps between two looks at whether the score is the best so far."""
    temperature: float = 1.0
    """What the sampler divides the logits by; the update divides policy's and reference's by the same."""
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = "kl"
    """KL of a token: "kl" log p - log q, "abs" its absolute value, "mse" half its square, "k3" an estimate that is
    never negative, "full" exact over the vocabulary (two more forward passes)."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch to unit variance, keeping their mean."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """With `use_score_scaling`, also take off their running mean."""
    score_clip: float | None = None
    """Then clamp scores to ± this."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a response that does not end with a stop token."""
    stop_token_ids: Sequence[int] | None = None
    """Every token that ends a response; if None, the tokenizer's eos and those of the model's generation config."""
    dual_clip: float | None = None
    """Bound the loss at this multiple (> 1) of -advantage where the advantage is negative."""
    value_warmup_steps: int = 0
    """Calls of `step`, from the first, in which the value head alone learns."""
    loss_denominator: Literal["minibatch", "batch"] = "minibatch"
    """"minibatch": mean over each optimizer step's response tokens; "batch": every token of the batch weighs the same."""
    importance_cap: float = 2.0
    """Largest correction of a token for which `sampler_logprobs` are given to `step`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What passes through the models compute in. "auto": bfloat16 where the hardware is faster with it and the model is
    large enough to gain. Weights, optimizer, losses and value head are float32 all the same; a float32 reference is held
    in this dtype."""

    optimizer_state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What Adam's two moments are held in. "bfloat16" takes 4 bytes a trained parameter less; the second moment is rounded at
    random, so that it still moves. Read when the trainer is made; for its own Adam, on unsharded float32 weights."""
    keep_memory: bool = True
    """On a CPU under glibc: keep the memory that a step frees for the next one, in the whole process. Faulting it in again
    costs a large part of an update's time; resident memory stays at its peak."""
    score_while_sampling: bool = False
    """Have `step` take the policy's log-probabilities and values from the pass in which `generate` drew the tokens, in place
    of a pass of its own: where our own loop sampled all responses of a batch from the policy's plain distribution and no
    weight has changed since. In bfloat16 they differ from those of the update's first pass by rounding."""
    max_skipped_updates: int | None = None
    """End the run after this many optimizer steps in a row whose loss or gradient was not finite; None: go on."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the policy's layers for the backward pass and run the layers again there (activation
    checkpointing): less memory, about a third more time in the update, the same numbers. Read when the trainer is made."""
    compile: bool = False
    """Run the layers of both models through torch.compile in scoring and in the update, not in sampling. Tried once when
    the trainer is made, which takes up to minutes; where it fails or gives other numbers the log says why, and layers run as
    they are."""

    def __repr__(self) -> str:
        """Without secrets: settings are printed, and stand in tracebacks."""
        settings = plain({f.name: getattr(self, f.name) for f in fields(self)})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn(
                "forward_batch_size is the old name of mini_batch_size: set that instead", UserWarning, stacklevel=3
            )
            self.mini_batch_size = self.forward_batch_size
        self.validate()

    @property
    def total_ppo_epochs(self) -> int:
        """Calls of `step` in a run of `steps` samples."""
        return math.ceil((self.steps or 0) / (self.batch_size or 1))

    @property
    def samples_per_update(self) -> int:
        """Samples that one optimizer step sees on one process."""
        return int(self.mini_batch_size or 1) * int(self.gradient_accumulation_steps or 1)

    def validate(self) -> None:
        """Checks every number.

        Raises:
            ValueError: naming the field, its value and what is expected.
        """
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # as a search over settings draws them
                setattr(self, name, value.item())
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        limit = self.max_skipped_updates
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_skipped_updates={limit!r} must be a whole number of at least 1 or None")
        for name in ("keep_memory", "score_while_sampling", "gradient_checkpointing", "compile"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False")
        ranges = {
            "gamma": (0, 1), "lam": (0, 1), "cliprange": (0, math.inf), "cliprange_value": (0, math.inf),
            "vf_coef": (0, math.inf), "init_kl_coef": (0, math.inf), "learning_rate": (0, math.inf),
            "value_warmup_steps": (0, math.inf),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be a number from {low} to {high}")
        for name in ("temperature", "importance_cap", "target", "horizon", "max_grad_norm", "score_clip"):
            value = getattr(self, name)
            optional = name in ("max_grad_norm", "score_clip")
            if not (optional and value is None) and not (_is_number(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0{' or None' if optional else ''}")
        if self.dual_clip is not None and not (_is_number(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"dual_clip={self.dual_clip!r} must be a number above 1 or None")
        penalty = self.missing_eos_penalty
        if penalty is not None and not (_is_number(penalty) and math.isfinite(penalty)):
            raise ValueError(f"missing_eos_penalty={penalty!r} must be a finite number or None")
        if self.early_stopping and not (_is_number(self.target_kl) and (self.target_kl or 0) > 0):
            raise ValueError(f"target_kl={self.target_kl!r} must be a number above 0 for early_stopping")
        if self.kl_penalty not in KL_PENALTIES:
            raise ValueError(f"kl_penalty={self.kl_penalty!r} must be one of {', '.join(KL_PENALTIES)}")
        if self.loss_denominator not in LOSS_DENOMINATORS:
            raise ValueError(
                f"loss_denominator={self.loss_denominator!r} must be one of {', '.join(LOSS_DENOMINATORS)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.optimizer_state_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"optimizer_state_dtype={self.optimizer_state_dtype!r} must be 'float32' or 'bfloat16'")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm=True works with use_score_scaling=True only")
        assert self.batch_size is not None
        if self.batch_size % self.samples_per_update:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size={self.mini_batch_size} x "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} = {self.samples_per_update}: the rest of the "
                "batch would be lost"
            )
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ValueError("push_to_hub_if_best_kwargs needs a repo_id to push to")
        for name in ("gradient_accumulation_steps", "gradient_accumulation_plugin"):
            if name in self.accelerator_kwargs:
                raise ValueError(f"set gradient_accumulation_steps on PPOConfig, not {name} in accelerator_kwargs")

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, with `total_ppo_epochs`; nested dictionaries are flattened with "/"."""
        from trl.core import flatten_dict

        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return flatten_dict(settings | {"total_ppo_epochs": self.total_ppo_epochs})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
