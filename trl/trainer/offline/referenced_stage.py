"""Common base of DPO and KTO: a policy and its reference, whose log-probabilities may be computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from trl.data.pairs import AnswerCollator
from trl.models.adapters import adapter_starts_at_zero, is_peft_model
from trl.models.trunk import base_language_model, evaluation_mode, has_lm_head, is_encoder_decoder
from trl.pretrained import hub_arguments
from trl.trainer.offline.answer_logprobs import cache_ref_logprobs, make_reference, score_answers
from trl.trainer.offline.preference_stage import PreferenceTrainer, PreparedRows
from trl.trainer.offline.stage import load_stage_model, stage_tokenizer, with_adapter
from trl.trainer.utils import disable_dropout_in_model
from trl.types import Rollout

# Arguments of TRL 0.7 to 0.11 that are no settings, with the values that ask for nothing.
OLD_ARGUMENTS: dict[str, tuple[Any, ...]] = {"model_init": (None,)}


class ReferencedTrainer(PreferenceTrainer):
    """A stage that compares the policy with a reference: by default with the policy before training.

    Args:
        model: the policy, or its hub id or folder.
        ref_model: the reference; None takes the policy as it is now.
        args: settings of the stage.
        processing_class: the tokenizer; None loads the model's.
        tokenizer: the older name of `processing_class`.
        peft_config: trains a new adapter.
        data_collator: replaces `AnswerCollator`.
        train_dataset: rows to train on.
        eval_dataset: rows to evaluate on, or a mapping of several data sets.
        **kwargs: the other arguments of `transformers.Trainer`.
    """

    # The columns that hold answers.
    answers: Sequence[str]

    @property
    def ref_columns(self) -> tuple[str, ...]:
        """Columns of the reference's log-probabilities, one for each column of answers."""
        raise NotImplementedError

    def __init__(
        self,
        model: Any,
        ref_model: Any,
        args: Any,
        *,
        processing_class: Any,
        tokenizer: Any,
        peft_config: Any,
        data_collator: Callable[..., Any] | None,
        train_dataset: Any,
        eval_dataset: Any,
        **kwargs: Any,
    ) -> None:
        if isinstance(ref_model, str) or (ref_model is not None and ref_model is model):
            raise ValueError(
                f"ref_model={ref_model if isinstance(ref_model, str) else 'model'!r}: pass a model other than the "
                "policy, or leave it out to compare with the policy as it is now"
            )
        if ref_model is not None and peft_config is not None:
            raise ValueError(
                "ref_model and peft_config: the base under a new adapter is the reference, so leave ref_model out; to "
                "train an adapter against another reference, give the model its adapter first with peft.get_peft_model"
            )
        set_seed(args.seed)  # of a new adapter
        model = load_policy(model, args)
        self.is_encoder_decoder = is_encoder_decoder(model)
        if args.is_encoder_decoder not in (None, self.is_encoder_decoder):
            raise ValueError(
                f"is_encoder_decoder={args.is_encoder_decoder}, but {type(base_language_model(model)).__name__} is "
                f"{'one' if self.is_encoder_decoder else 'none'}: leave it out"
            )
        self.args = args
        self.processing_class = stage_tokenizer(processing_class, tokenizer, model, args)
        model = with_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.collate_answers = AnswerCollator(
            self.answers,
            pad_token_id=self.processing_class.pad_token_id,
            decoder_start=_decoder_start(model),
            floats=self.ref_columns,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        self.ref_model: nn.Module | None = ref_model
        train_rows = self.tokenised(train_dataset, "train_dataset")
        eval_rows = self.tokenised(eval_dataset, "eval_dataset")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.collate_answers,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=self.processing_class,
            **kwargs,
        )
        self._trl_set_reference()
        for name, rows in (("train_dataset", train_rows), ("eval_dataset", eval_rows)):
            for part in rows.values() if isinstance(rows, Mapping) else [rows] * (rows is not None):
                self.with_reference(part, name)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return True

    # --- The reference ---

    def _trl_set_reference(self) -> None:
        """Decides whether the reference's log-probabilities are cached, and makes the reference if they are not."""
        model, once = self.model, self.args.precompute_ref_log_probs
        base_is_reference = self.ref_model is None and is_peft_model(model) and adapter_starts_at_zero(model)
        self.caches_reference = self.needs_reference and (not base_is_reference if once is None else once)
        self._trl_reference = None
        if self.needs_reference and not (self.caches_reference and self.ref_model is None and not base_is_reference):
            if self.ref_model is not None:
                self.ref_model.to(self.args.device)
            self._trl_reference, separate = make_reference(model, self.ref_model)
            self.ref_model = separate
            if separate is not None:
                self._trl_passes().adopt_reference(separate, model)

    def prepared(self, dataset: Any, name: str) -> Any:
        """Tokenises a data set, or each of a mapping, and adds the reference's log-probabilities."""
        rows = self.tokenised(dataset, name)
        for part in rows.values() if isinstance(rows, Mapping) else [rows] * (rows is not None):
            self.with_reference(part, name)
        return rows

    def with_reference(self, rows: PreparedRows, name: str) -> None:
        """Writes the reference's log-probabilities into rows that lack them, if they are computed once."""
        if not self.caches_reference or all(column in row for row in rows for column in self.ref_columns):
            return
        reference = self._trl_reference
        if reference is None:
            if self.state.global_step > 0:
                raise ValueError(
                    f"{name} was not given to the constructor, and the policy as it was before training is gone: give "
                    "the data set to the constructor as eval_dataset, pass a ref_model, or set "
                    "precompute_ref_log_probs=False"
                )
            model = self.model
            reference = lambda: nullcontext(model)  # noqa: E731
        with self._trl_passes().fresh_passes():
            cache_ref_logprobs(
                rows,
                self.ref_columns,
                reference,
                self.collate_answers,
                batch_size=self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size,
                accelerator=self.accelerator,
            )

    def reference_logprobs(self, inputs: dict[str, Any], rollout: Rollout) -> list[Tensor]:
        """Returns the reference's log-probabilities `[B]` of each answer column; zeros if no loss needs a reference."""
        if self.ref_columns[0] in inputs:
            return [inputs[column] for column in self.ref_columns]
        rows = len(rollout) // len(self.ref_columns)
        if not self.needs_reference:
            return [torch.zeros(rows, device=rollout.tokens.device) for _ in self.ref_columns]
        if self._trl_reference is None:
            raise ValueError(
                f"the data_collator leaves out {', '.join(self.ref_columns)}, which were computed once: keep these "
                "columns, or set precompute_ref_log_probs=False"
            )
        with self._trl_reference() as model, evaluation_mode(model), torch.no_grad():
            return list(score_answers(model, rollout, details=False).logprobs.chunk(len(self.ref_columns)))


def load_policy(model: Any, args: Any) -> Any:
    """Returns the policy: an object as it is, or a causal or encoder-decoder model by id or folder.

    Raises:
        ValueError: if it has no language-model head, or is a model with a value head.
    """
    if hasattr(model, "v_head"):
        raise ValueError(
            f"model is a {type(model).__name__}, whose value head would not be trained: pass model.pretrained_model"
        )
    if isinstance(model, str):
        options = args.model_init_kwargs or {}
        config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **hub_arguments(options))
        parent = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
        return load_stage_model(model, parent, args)
    model = load_stage_model(model, AutoModelForCausalLM, args)
    if not has_lm_head(model, ("lm_head", "embed_out")):
        raise ValueError(f"model is a {type(base_language_model(model)).__name__}, which has no language-model head")
    return model


def _decoder_start(model: nn.Module) -> int | None:
    """Returns the decoder's start token of an encoder-decoder.

    Raises:
        ValueError: if its configuration names none.
    """
    if not is_encoder_decoder(model):
        return None
    config = base_language_model(model).config
    token = getattr(config, "decoder_start_token_id", None)
    if token is None:
        raise ValueError(f"{type(config).__name__} has no decoder_start_token_id: set it in model.config")
    return int(token)
