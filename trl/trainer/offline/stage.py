"""What the offline stages share: model and tokenizer from arguments, passes in bfloat16, metrics as sums, refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from trl.kernels.allocator import keep_freed_memory
from trl.kernels.streaming_adam import adam_step, can_stream, total_norm
from trl.models.adapters import attach_adapter, is_peft_model
from trl.models.recompute import recompute_activations
from trl.models.trunk import base_language_model
from trl.pretrained import load_model, load_tokenizer
from trl.trainer.offline.stage_card import CardTrainer
from trl.trainer.offline.stage_config import StageConfig
from trl.trainer.offline.stage_run import NoRun, RunIsDone, StageRun, last_whole_checkpoint
from trl.training.compute import Compute
from trl.training.optimizers import inner
from trl.training.processes import sum_over_processes
from trl.types import Tally

logger = logging.getLogger(__name__)


class StageTrainer(CardTrainer):
    """`transformers.Trainer` with this library's passes, gradients and metrics; a stage adds `compute_loss`.

    The loop, checkpoints, callbacks and resuming are transformers'. Passes run in bfloat16 on float32 weights where
    `StageConfig.compute_dtype` says so, and metrics are sums and counts that are divided once, when they are logged.

    Args:
        model: the model to train, with its adapter.
        args: settings.
        **kwargs: the other arguments of `transformers.Trainer`.
    """

    # The loss is a sum over all tokens of an optimizer step, divided by their number.
    loss_is_scaled_for_ga = True

    def __init__(self, model: Any, args: StageConfig, **kwargs: Any) -> None:
        if model is not None:
            set_recomputation(model, args)
        self._trl_tallies: dict[str, dict[str, Tally]] = {"train": {}, "eval": {}}
        self._trl_compute: Compute | None = None
        self._trl_stale = True  # weights may have changed since the bfloat16 copies were made
        self._trl_scale = 1.0  # of the gradients that are still in bfloat16 when the optimizer steps
        self._trl_hooked: Any = None  # the optimizer that has `_trl_step_narrow` as its hook
        self._trl_run: StageRun | NoRun = NoRun()
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # counts the tokens of an optimizer step for compute_loss
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support nn.DataParallel, which transformers uses when one process "
                f"sees {self.args.n_gpu} GPUs: start the script with torchrun or accelerate launch, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        keep_freed_memory()

    def call_model_init(self, trial: Any = None) -> Any:
        """Builds the model anew; see `model_init`."""
        model = super().call_model_init(trial)
        set_recomputation(model, self.args)
        self._trl_compute, self._trl_stale = None, True
        return model

    # --- Metrics ---

    def tally(self, tallies: Mapping[str, Tally]) -> None:
        """Adds to the metrics of the current mode; `log` divides each sum by its count.

        Args:
            tallies: by the key that is logged, without the prefix of an evaluation.
        """
        sums = self._trl_tallies["train" if self.model.training else "eval"]
        for name, value in tallies.items():
            value = value.detach()
            sums[name] = sums[name] + value if name in sums else value

    def _trl_means(self, mode: str) -> dict[str, float]:
        """Means over all processes since the last call."""
        tallies, self._trl_tallies[mode] = self._trl_tallies[mode], {}
        if not tallies:
            return {}
        names = sorted(tallies)
        table = torch.stack([torch.stack([tallies[name].sum.double(), tallies[name].count.double()]) for name in names])
        sums = sum_over_processes(self.accelerator, table).tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs a row; a row of training gets the stage's metrics since the last one."""
        if "loss" in logs:
            logs.update(self._trl_means("train"))
            if "num_tokens" not in logs and self.args.include_num_input_tokens_seen == "no":
                logs["num_tokens"] = float(self.state.num_input_tokens_seen)
        super().log(logs, start_time)

    def count_tokens(self, tokens: Tensor) -> None:
        """Adds a scalar count of this process's tokens to the run's `num_tokens`; checkpoints keep it."""
        if self.model.training and self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen += int(sum_over_processes(self.accelerator, tokens.reshape(1)))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluates, and adds the stage's metrics; a tallied `loss` replaces transformers' mean of batch means."""
        self._trl_tallies["eval"] = {}
        self._trl_refresh()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._trl_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # --- Passes and gradients ---

    def _trl_passes(self) -> Compute:
        if self._trl_compute is None:
            self._trl_compute = Compute(self.model_wrapped, self.args.compute_dtype, self.accelerator)
        return self._trl_compute

    def _trl_refresh(self) -> None:
        self._trl_passes().weights_changed()
        self._trl_stale = False

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        run_dir: str | Path | None = None,
        progress: bool | None = None,
        launch: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains; as `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last whole one in `args.output_dir`: a run
                that was killed in the middle of a save leaves one that is not. "auto" takes that one too, and begins
                anew without it. With `run_dir`: None for a new run, True to go on with the run in the folder, "auto"
                for either.
            *args: passed on.
            run_dir: folder that records the training as a run of `PPOTrainer.train` (docs/runs.md): settings, metrics,
                events, checkpoints, and at the end the model.
            progress: with `run_dir`: show progress; None: unless `args.disable_tqdm`.
            launch: with `run_dir`: how the run was started, kept in its settings.
            **kwargs: passed on.

        Raises:
            ValueError: if there is no whole checkpoint for True, or `run_dir` does not fit the other arguments.
            KeyboardInterrupt: with `run_dir`, after SIGINT, once the step is saved.
            SystemExit: with `run_dir`, after SIGTERM, likewise.
        """
        self._trl_stale = True
        if run_dir is not None:
            run = StageRun(self, run_dir, resume=resume_from_checkpoint, launch=launch, progress=progress)
            return self._trl_train_in(run, *args, **kwargs)
        if progress is not None or launch is not None:
            raise ValueError("progress and launch are for a run: pass run_dir, too")
        if resume_from_checkpoint is True or resume_from_checkpoint == "auto":
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            if checkpoint is None and resume_from_checkpoint is True:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} has no checkpoint that was saved to its "
                    "end: "
                    'pass "auto" to begin anew in that case'
                )
            resume_from_checkpoint = checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _trl_train_in(self, run: StageRun, *args: Any, **kwargs: Any) -> Any:
        self._trl_run = run
        try:
            with run:
                try:
                    output = super().train(None if run.checkpoint is None else str(run.checkpoint), *args, **kwargs)
                except RunIsDone:
                    self.is_in_train = False
                    if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                        self._load_best_model()
                    output = TrainOutput(self.state.global_step, math.nan, {})
                run.end()
        finally:
            self._trl_run = NoRun()
        return output

    def _get_output_dir(self, trial: Any) -> str:
        checkpoints = self._trl_run.checkpoints
        return super()._get_output_dir(trial) if checkpoints is None else str(checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._trl_run.before_save()
        super()._save_checkpoint(model, trial)

    def _trl_log_sums(self) -> dict[str, Any]:
        """The sums of a log row that is not complete yet, over all processes, as JSON. Every process must call this."""
        loss = sum_over_processes(self.accelerator, self._tr_loss.detach().clone()) / self.accelerator.num_processes
        tallies = {}
        for name, tally in sorted(self._trl_tallies["train"].items()):
            parts = [sum_over_processes(self.accelerator, part.clone()) for part in (tally.sum, tally.count)]
            tallies[name] = [[float(part), str(part.dtype).removeprefix("torch.")] for part in parts]
        return {"loss": float(loss), "logged": self._globalstep_last_logged, "tallies": tallies}

    def _trl_restore_log_sums(self, sums: Mapping[str, Any]) -> None:
        """Goes on with the sums of `_trl_log_sums`."""
        self._tr_loss = torch.tensor(sums["loss"], device=self.args.device)
        self._globalstep_last_logged = sums["logged"]
        mine = self.accelerator.is_main_process  # the sums are those of all processes

        def part(value: float, dtype: str) -> Tensor:
            return torch.tensor(value if mine else 0, dtype=getattr(torch, dtype), device=self.args.device)

        self._trl_tallies["train"] = {
            name: Tally(*(part(value, dtype) for value, dtype in parts)) for name, parts in sums["tallies"].items()
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of one batch."""
        compute = self._trl_passes()
        optimizer = inner(self.optimizer)
        if self._trl_hooked is not optimizer:
            optimizer.register_step_pre_hook(self._trl_step_narrow)
            self._trl_hooked = optimizer
        if self._trl_stale:
            self._trl_refresh()
        whole = self.current_gradient_accumulation_steps == 1 and can_stream(optimizer)
        with compute.passes(gradients_in_place=whole):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """One batch of an evaluation."""
        with self._trl_passes().passes():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._trl_passes().gradients():
            return super()._clip_grad_norm(model)
        norm = self._trl_norm(model)
        self._trl_scale = float((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._trl_passes().gradients():
            return self._trl_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _trl_norm(self, model: nn.Module) -> Tensor:
        wide = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return total_norm(self._trl_passes().gradients().values(), wide)

    def _trl_step_narrow(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Before an optimizer's own step: updates the weights whose gradients are still in bfloat16."""
        compute = self._trl_passes()
        narrow = compute.gradients()
        if narrow:
            compute.narrowed(adam_step(optimizer, narrow, self._trl_scale))
        self._trl_scale = 1.0
        # Weights with float32 gradients change in the optimizer's own step, so their copies are made again.
        self._trl_stale = not narrow or any(p.grad is not None for p in self.model.parameters())


# --- Arguments of the constructors ---


def load_stage_model(model: Any, parent: Any, args: StageConfig) -> Any:
    """Returns the model to train: an object as it is, or the one of an id or folder, in float32 unless asked otherwise.

    Args:
        model: a transformers or PEFT model, or a hub id or folder.
        parent: the auto class that loads it.
        args: `model_init_kwargs` go to `from_pretrained`; weights are read from safetensors unless they have
            `allow_pickle=True`.

    Raises:
        ValueError: if `model` is of another type, or is an object and `model_init_kwargs` are given.
    """
    if isinstance(model, str):
        options = args.init_kwargs
        options.setdefault("dtype", options.pop("torch_dtype", torch.float32))
        if isinstance(options["dtype"], str) and options["dtype"] != "auto":
            options["dtype"] = getattr(torch, options["dtype"])
        options.setdefault("trust_remote_code", args.trust_remote_code)
        return load_model(parent, model, **options)
    if args.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={args.model_init_kwargs} are for a model given as an id or folder, but model is a "
            f"{type(model).__name__}: pass them to its from_pretrained"
        )
    if not isinstance(model, PreTrainedModel) and not is_peft_model(model):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a transformers or PEFT model, a hub id or a folder"
        )
    return model


def set_recomputation(model: Any, args: StageConfig) -> None:
    """Turns on activation checkpointing for the model's lifetime, unless `args` or the architecture rule it out.

    Raises:
        ValueError: if `args` ask for them, and transformers does not support them for this architecture.
    """
    if args.gradient_checkpointing is False:
        return
    try:
        recompute_activations(model)
    except ValueError as error:
        if args.gradient_checkpointing:
            raise
        logger.info("activations are kept: %s", error)


def with_adapter(model: Any, peft_config: Any) -> Any:
    """Returns the model with a new adapter; with None as it is.

    Raises:
        ValueError: if `peft_config` is no `peft.PeftConfig`, or the model has an adapter already.
        ImportError: if peft is missing.
    """
    if peft_config is None:
        return model
    if is_peft_model(model):
        raise ValueError(
            "the model has an adapter already, and peft_config would add another: pass only one of them, or merge the "
            "adapter first with model.merge_and_unload()"
        )
    return attach_adapter(model, peft_config)


def stage_tokenizer(
    processing_class: Any, tokenizer: Any, model: Any, args: StageConfig, *, eos_token: str | None = None
) -> Any:
    """Returns the tokenizer: the given one, or the model's own; a missing pad token becomes the end-of-sequence token.

    Args:
        processing_class: TRL 1's name of the argument.
        tokenizer: TRL 0.4's name of the argument.
        model: the model, whose folder or hub id has a tokenizer.
        args: `pad_token`, `trust_remote_code` and the revision in `model_init_kwargs` are used.
        eos_token: the end-of-sequence token to set, on the tokenizer and the model's configuration.

    Raises:
        ValueError: if both arguments are given, it is no tokenizer, it cannot be found, or it lacks a given token.
    """
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise ValueError("processing_class and tokenizer are two names of one argument: pass only one of them")
    given = tokenizer if processing_class is None else processing_class
    base = base_language_model(model)
    if given is None:
        source = getattr(base.config, "_name_or_path", "")
        if not source:
            raise ValueError(
                "the model does not say which folder or hub id it is from: pass its tokenizer as processing_class"
            )
        revision = args.init_kwargs.get("revision")
        options = {} if revision is None else {"revision": revision}
        given = load_tokenizer(source, trust_remote_code=args.trust_remote_code, **options)
    if not isinstance(given, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class is a {type(given).__name__}: only tokenizers are supported, not processors of images"
        )
    for setting, token in (("eos_token", eos_token), ("pad_token", args.pad_token)):
        if token is not None and token not in given.get_vocab():
            raise ValueError(
                f"{setting}={token!r} is not in the tokenizer's vocabulary: choose one of its tokens, or add it first"
            )
    if eos_token is not None:
        given.eos_token = eos_token
        set_eos_token(base, given.eos_token_id)
    if args.pad_token is not None:
        given.pad_token = args.pad_token
    if given.pad_token is None:
        if given.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a pad token nor an end-of-sequence token: set pad_token in the config"
            )
        given.pad_token = given.eos_token
    return given


def set_eos_token(model: Any, token: int) -> None:
    """Makes `token` the model's end of a sequence; generation goes on ending at its former ends, too."""
    model.config.eos_token_id = token
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        before = generation.eos_token_id
        ends = [] if before is None else before if isinstance(before, Sequence) else [before]
        generation.eos_token_id = [token, *(end for end in ends if end != token)] if ends else token


def name_of(model: Any, stage: str) -> str:
    """Default output folder: the last part of the model's name, and the stage."""
    source = model if isinstance(model, str) else str(getattr(base_language_model(model).config, "_name_or_path", ""))
    return f"{source.rstrip('/').split('/')[-1] or 'model'}-{stage}"
