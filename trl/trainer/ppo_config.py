"""`PPOConfig`: hyperparameters and runtime settings of `PPOTrainer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trl import legacy
from trl.trackers.plain import plain
from trl.trainer.setting_names import DEFAULTS_OF, SINCE_0_7, names_unknown_settings

_CHOICES = {
    "kl_penalty": ("kl", "abs", "mse", "k3", "full"),
    "loss_denominator": ("minibatch", "batch"),
    "dtype": ("auto", "float32", "bfloat16"),
    "optimizer_state_dtype": ("float32", "bfloat16"),
}


@names_unknown_settings
@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`.

    Changes made after the trainer is built apply from its next call; settings that are read only once warn instead.
    """

    task_name: str | None = None
    """Task name, reported to trackers."""
    model_name: str | None = None
    """Model name, for your script and for trackers."""
    steps: int | None = 20000
    """Planned number of samples. Used only to compute `total_ppo_epochs`."""
    learning_rate: float | None = 1e-5
    """Learning rate of the default optimizer, Adam."""
    adap_kl_ctrl: bool | None = True
    """Adapt the KL coefficient to reach `target`; if False, keep it at `init_kl_coef`."""
    init_kl_coef: float | None = 0.2
    """Initial (or fixed) KL penalty coefficient."""
    target: float | None = 6
    """Target KL of the adaptive controller, in nats per sequence."""
    horizon: float | None = 10000
    """Time scale of the adaptive controller, in samples."""
    gamma: float | None = 1
    """Discount factor, 0 to 1."""
    lam: float | None = 0.95
    """λ of generalised advantage estimation, 0 to 1."""
    cliprange: float | None = 0.2
    """Clip the probability ratio of the policy loss to 1 ± this."""
    cliprange_value: float | None = 0.2
    """Clip new values to within ± this of the old ones in the value loss."""
    vf_coef: float | None = 0.1
    """Weight of the value loss."""
    batch_size: int | None = 256
    """Samples per call to `step`, on each process."""
    forward_batch_size: int | None = None
    """Deprecated name of `mini_batch_size`."""
    mini_batch_size: int | None = 1
    """Samples per forward and backward pass."""
    gradient_accumulation_steps: int | None = 1
    """Forward and backward passes per optimizer step. A step covers `mini_batch_size * gradient_accumulation_steps`
    samples; how these are split between the two settings does not change the gradient."""
    ppo_epochs: int | None = 4
    """Optimisation passes over each batch."""
    remove_unused_columns: bool | None = True
    """Drop the columns of a `datasets.Dataset` that neither the model's `forward` nor the trainer uses."""
    log_with: str | None = None
    """Tracker or list of trackers: "tensorboard", "wandb", "trackio", "mlflow", or another that accelerate supports."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for each tracker's client, by the tracker's name: `{"wandb": {"tags": ["a"]}}`."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `accelerate.Accelerator`."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `accelerate.utils.ProjectConfiguration`, such as `logging_dir`, where trackers write. By
    default they write to the folder of a managed run, or to `runs/` and the project's name."""
    tracker_project_name: str = "trl"
    """Project name reported to the tracker."""
    max_grad_norm: float | None = None
    """Clip the gradient norm to this, once per optimizer step."""
    seed: int | None = 0
    """Seed of the Python, NumPy and torch generators and of the minibatch order."""
    optimize_cuda_cache: bool = False
    """Empty the accelerator's memory cache at the end of each step."""
    early_stopping: bool = False
    """Stop optimising on a batch once `ppo/policy/policykl` exceeds 1.5 times `target_kl`."""
    target_kl: float | None = 0.1
    """KL threshold of early stopping, in nats per token."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `push_to_hub` (at least `repo_id`). If set, the model is uploaded whenever the mean score is the
    best so far."""
    compare_steps: int | None = 1
    """Steps between two checks for a new best score."""
    temperature: float = 1.0
    """Sampling temperature. The update divides the logits of policy and reference by it as well."""
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = "kl"
    """Per-token KL estimator: "kl" is log p - log q, "abs" its absolute value, "mse" half its square, "k3" the
    non-negative k3 estimator, "full" the exact KL over the vocabulary (two extra forward passes)."""
    whiten_rewards: bool = False
    """Scale each batch's rewards to unit variance, keeping their mean."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """Also subtract the running mean of the scores; requires `use_score_scaling`."""
    score_clip: float | None = None
    """Clamp scores to ± this, after any scaling."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that does not end with a stop token."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end a response. None: the tokenizer's eos and those in the model's generation config."""
    dual_clip: float | None = None
    """Dual-clip PPO: where the advantage is negative, cap the loss at this multiple (> 1) of -advantage."""
    value_warmup_steps: int = 0
    """Number of initial calls to `step` that train only the value head."""
    loss_denominator: Literal["minibatch", "batch"] = "minibatch"
    """"minibatch" averages over the response tokens of each optimizer step; "batch" gives every token of the batch the
    same weight."""
    importance_cap: float = 2.0
    """Upper bound on the per-token importance weights that correct for `sampler_logprobs` given to `step`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of forward passes. "auto" picks bfloat16 where the hardware is faster with it and the model is
    large enough to benefit. Weights, optimizer, losses and value head stay float32; a float32 reference model is stored
    in this dtype."""

    optimizer_state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage dtype of Adam's two moments. "bfloat16" saves 4 bytes per trained parameter; the second moment uses
    stochastic rounding, so that small updates are not lost. Read once, when the trainer is built; requires the
    trainer's own Adam and unsharded float32 weights."""
    keep_memory: bool = True
    """On CPU with glibc, reuse the memory freed by one step for the next instead of returning it to the system. This
    saves page faults, which take a large part of an update's time, but resident memory stays at its peak. Affects the
    whole process."""
    score_while_sampling: bool = False
    """Let `step` reuse the policy's log-probabilities and values from `generate` and skip its own scoring pass. This
    requires that trl's own decoding loop sampled every response of the batch from the policy's unmodified distribution
    and that no weight has changed since; responses are recognised by their tokens. Changes that torch does not count go
    unnoticed: weights written through `.data` or by a fused optimizer of your own, changed hooks and modules. In
    bfloat16 the results differ from the update's first pass by rounding."""
    max_skipped_updates: int | None = None
    """Raise after this many consecutive optimizer steps with a non-finite loss or gradient. None: never."""
    group_size: int = 1
    """Responses sampled for each prompt in `train`; `batch_size` counts responses. Algorithms that compare the
    responses to one prompt need several."""
    gradient_checkpointing: bool = False
    """Activation checkpointing: store only the inputs of the policy's layers and recompute the layers in the backward
    pass. Uses less memory, makes the update about a third slower, and gives the same numbers. Read once, when the
    trainer is built."""

    exp_name: str | None = None
    """Name of the experiment, for your script and for trackers."""
    query_dataset: str | None = None
    """Name of the dataset of queries, for your script and for trackers."""
    reward_model: str | None = None
    """Name of the reward model, for your script and for trackers."""
    dataset_num_proc: int | None = None
    """Number of processes that prepare the dataset, for your script."""
    optimize_device_cache: bool = False
    """Another name of `optimize_cuda_cache`."""
    ratio_threshold: float | None = None
    """Skip an optimizer step if the mean probability ratio of its minibatch is above this. TRL 0.5 to 0.11 had 10."""
    backward_batch_size: int | None = None
    """Samples per optimizer step, as `samples_per_update`; computed from the settings above, so that a given value is
    ignored."""
    world_size: int | None = None
    """Number of processes; written by the trainer, like those below."""
    global_batch_size: int | None = None
    """Samples per call to `step`, over all processes."""
    global_backward_batch_size: int | None = None
    """Samples per optimizer step, over all processes."""
    is_encoder_decoder: bool | None = None
    """Whether the model is an encoder-decoder."""
    is_peft_model: bool | None = None
    """Whether the model has an adapter."""

    @classmethod
    def like(cls, version: str, **settings: Any) -> PPOConfig:
        """The settings with the defaults of another release of TRL.

        Args:
            version: "0.4" to "0.11". The defaults of PPO changed with 0.7: learning rate, batch and mini-batch,
                `target_kl`.
            **settings: as for `PPOConfig`.

        Raises:
            ValueError: if `version` is none of these.
        """
        minor = ".".join(version.split(".")[:2])
        if minor not in DEFAULTS_OF:
            raise ValueError(f"version={version!r} must be one of {', '.join(DEFAULTS_OF)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*defaults of TRL 0.7")
            return cls(**(DEFAULTS_OF[minor] | settings))

    def __repr__(self) -> str:
        """All settings, with secrets redacted: they may be printed or appear in tracebacks."""
        settings = plain({f.name: getattr(self, f.name) for f in fields(self)})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn("forward_batch_size is deprecated: set mini_batch_size instead", UserWarning, stacklevel=4)
            self.mini_batch_size = self.forward_batch_size
        self.optimize_cuda_cache = bool(self.optimize_cuda_cache or self.optimize_device_cache)
        self.validate()
        self.backward_batch_size = self.samples_per_update
        self._notice_other_defaults()

    def _notice_other_defaults(self) -> None:
        """Warns a script of TRL 0.7 to 0.11 about defaults that it may rely on."""
        defaults = {f.name: f.default for f in fields(self)}
        newer = [name for name in SINCE_0_7 if getattr(self, name) != defaults[name]]
        then = DEFAULTS_OF["0.7"]
        relied_on = [
            name
            for name in (
                "learning_rate",
                "batch_size",
                "mini_batch_size",
                *(("target_kl",) if self.early_stopping else ()),
            )
            if getattr(self, name) == defaults[name]
        ]
        if newer and relied_on:
            settings = ", ".join(f"{name}={defaults[name]} ({then[name]} there)" for name in relied_on)
            warnings.warn(
                f"{newer[0]} is a setting of TRL 0.7 to 0.11, whose defaults differ from those of 0.4.6 that apply "
                f"here: {settings}. PPOConfig.like('0.11', ...) has the defaults of TRL 0.7 and later",
                stacklevel=5,
            )

    @property
    def total_ppo_epochs(self) -> int:
        """Number of calls to `step` that a run of `steps` samples takes."""
        return math.ceil((self.steps or 0) / (self.batch_size or 1))

    @property
    def samples_per_update(self) -> int:
        """Samples per optimizer step on each process."""
        return int(self.mini_batch_size or 1) * int(self.gradient_accumulation_steps or 1)

    def validate(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: if a setting is out of range; the message names the field, its value and what is expected.
        """
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # hyperparameter searches draw NumPy scalars
                setattr(self, name, value.item())
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        for name in (
            "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps", "group_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.optimize_cuda_cache is None:  # the default of TRL 0.7 to 0.11
            self.optimize_cuda_cache = False
        limit = self.max_skipped_updates
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_skipped_updates={limit!r} must be a whole number of at least 1 or None")
        for name in ("keep_memory", "score_while_sampling", "gradient_checkpointing"):
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
        for name in (
            "temperature",
            "importance_cap",
            "target",
            "horizon",
            "max_grad_norm",
            "score_clip",
            "ratio_threshold",
        ):
            value = getattr(self, name)
            optional = name in ("max_grad_norm", "score_clip", "ratio_threshold")
            if not (optional and value is None) and not (_is_number(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0{' or None' if optional else ''}")
        if self.dual_clip is not None and not (_is_number(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"dual_clip={self.dual_clip!r} must be a number above 1 or None")
        penalty = self.missing_eos_penalty
        if penalty is not None and not (_is_number(penalty) and math.isfinite(penalty)):
            raise ValueError(f"missing_eos_penalty={penalty!r} must be a finite number or None")
        if self.early_stopping and not (_is_number(self.target_kl) and (self.target_kl or 0) > 0):
            raise ValueError(f"target_kl={self.target_kl!r} must be a number above 0 for early_stopping")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")

    def _check_combinations(self) -> None:
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm=True needs use_score_scaling=True")
        assert self.batch_size is not None
        if self.batch_size % self.samples_per_update:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size={self.mini_batch_size} x "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} = {self.samples_per_update}: the rest "
                "of the batch would not be trained on"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of group_size={self.group_size}: the last prompt "
                "would have fewer responses than the others"
            )
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ValueError("push_to_hub_if_best_kwargs must contain repo_id")
        for name in ("gradient_accumulation_steps", "gradient_accumulation_plugin"):
            if name in self.accelerator_kwargs:
                raise ValueError(f"set PPOConfig.gradient_accumulation_steps, not {name} in accelerator_kwargs")

    def to_dict(self) -> dict[str, Any]:
        """Settings by name, including `total_ppo_epochs`, with nested dictionaries flattened by "/"."""
        from trl.core import flatten_dict

        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return flatten_dict(settings | {"total_ppo_epochs": self.total_ppo_epochs})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


if not TYPE_CHECKING:  # type checkers still report unknown names
    __getattr__ = legacy.lookup(__name__)
