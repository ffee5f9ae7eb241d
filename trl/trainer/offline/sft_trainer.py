"""`SFTTrainer`: supervised fine-tuning on texts, chats, and prompts with completions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainingArguments, set_seed

from trl.data.constant_length import ConstantLengthDataset
from trl.data.formats import DataFormat, open_source
from trl.data.loader import is_hub_stream
from trl.data.readers import Located
from trl.data.row_encoder import RowEncoder
from trl.data.sequence_collators import DataCollatorForCompletionOnlyLM, SequenceCollator
from trl.data.tokenized import IGNORED, Strategy, StreamedRows, TokenRows
from trl.functional.supervised import TOKEN_LOSSES
from trl.models.evaluate import evaluate
from trl.models.limits import context_length
from trl.models.trunk import base_language_model, is_encoder_decoder
from trl.pretrained import load_tokenizer
from trl.rollout.decoders import start_token
from trl.trainer.offline.sft_config import SFTConfig
from trl.trainer.offline.stage import StageTrainer, load_stage_model, name_of, stage_tokenizer, with_adapter
from trl.trainer.offline.stage_card import StageKind, source_name
from trl.types import Rollout, Tally

logger = logging.getLogger(__name__)

_OLD_DEFAULTS = {"infinite": False, "num_of_sequences": 1024, "chars_per_token": 3.6}


class SFTTrainer(StageTrainer):
    """Supervised fine-tuning with `transformers.Trainer`'s loop; scripts of TRL 0.4.6 and of TRL 1 run unchanged.

    Data sets are paths to JSONL, CSV or Parquet files, hub ids, lists of rows, or `datasets` objects. A row has `text`
    (or the field that is named), `messages`, `prompt` and `completion`, or `input_ids`. Sequences that share a packed
    or joined row never see each other. The loss is the mean over all counted tokens of an optimizer step; no logits are
    made.

    An encoder-decoder is trained on rows with `prompt`, which its encoder reads, and `completion`.

    Args:
        model: a transformers or PEFT model, or the hub id or folder of one.
        args: `SFTConfig`, or `transformers.TrainingArguments`, whose precision and other settings are then kept.
        data_collator: None for padding, or for joining where rows are packed or `padding_free` is set.
        train_dataset: rows to train on.
        eval_dataset: rows to evaluate on, or several such data sets by name.
        processing_class: the tokenizer; None loads the model's.
        tokenizer: TRL 0.4's name of `processing_class`.
        model_init: builds the model for each call of `train`, in place of `model`.
        compute_metrics: metrics of an evaluation, from logits and labels.
        callbacks: callbacks of `transformers.Trainer`.
        optimizers: optimizer and scheduler; None for those of `args`.
        optimizer_cls_and_kwargs: class and arguments of the optimizer.
        preprocess_logits_for_metrics: reduces the logits before `compute_metrics`.
        peft_config: trains a new adapter of this kind.
        formatting_func: turns a row into its text. With `TrainingArguments` and without packing it is TRL 0.4's: it
            turns a mapping of columns into a list of texts.
        dataset_text_field: column of a row's text, as in TRL 0.4; replaces `SFTConfig.dataset_text_field`.
        packing: TRL 0.4's packing into a `ConstantLengthDataset`, whose texts see each other; `SFTConfig(packing=True)`
            keeps sequences apart.
        max_seq_length: tokens of a row; replaces `SFTConfig.max_length`.
        infinite: for `packing`: begin the data set again at its end; set from `max_steps`.
        num_of_sequences: for `packing`: rows in a buffer.
        chars_per_token: for `packing`: characters of a token, to fill the buffer.

    Raises:
        ValueError: if arguments contradict each other, or a row is not sound.
    """

    stage_kind = StageKind(
        tag="sft",
        summary="fine-tuned on examples",
        method="Supervised fine-tuning, on the mean loss over the tokens that count",
    )

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[[], Any] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        max_seq_length: int | None = None,
        infinite: bool | None = None,
        num_of_sequences: int | None = None,
        chars_per_token: float | None = None,
        *,
        processing_class: Any = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise ValueError("pass either model or model_init")
        if packing and isinstance(data_collator, DataCollatorForCompletionOnlyLM):
            raise ValueError(
                "packing=True joins texts, in which DataCollatorForCompletionOnlyLM cannot tell them apart: drop one"
            )
        self._trl_batches = args is not None and not isinstance(args, SFTConfig)  # how TRL 0.4 calls formatting_func
        settings = SFTConfig.from_arguments(args, output_dir=name_of(model if model is not None else "model", "SFT"))
        settings.accelerator_config.dispatch_batches = False  # or accelerate would join batches of different lengths
        if model_init is not None:
            if peft_config is not None:
                raise ValueError(
                    "model_init builds the model with its adapter: call peft.get_peft_model there, and drop peft_config"
                )
            model = model_init()  # for its tokenizer and its kind; transformers builds it again to train it
        set_seed(settings.seed)  # an adapter starts with random weights
        model = with_adapter(load_stage_model(model, _auto_class(model, settings), settings), peft_config)
        self._trl_tokenizer = stage_tokenizer(
            processing_class, tokenizer, model, settings, eos_token=settings.eos_token
        )
        _set_chat_template(self._trl_tokenizer, settings)
        self._trl_formatting = formatting_func
        self._trl_text_field = dataset_text_field
        old = {"infinite": infinite, "num_of_sequences": num_of_sequences, "chars_per_token": chars_per_token}
        self._trl_old_packing = _old_packing(packing, old, settings)
        self._trl_max_length = _max_length(max_seq_length, settings, self._trl_tokenizer, model)
        self._trl_seq2seq = is_encoder_decoder(model)
        if settings.completion_only_loss and formatting_func is not None:
            raise ValueError(
                "completion_only_loss=True with formatting_func: a formatted row is one text, whose completion cannot "
                "be told apart. Pass rows with prompt and completion instead"
            )
        flat = settings.packing or bool(settings.eval_packing) or settings.padding_free
        if flat and self._trl_seq2seq:
            raise ValueError("packing and padding_free are for decoder-only models, and this is an encoder-decoder")
        if flat and data_collator is not None:
            raise ValueError("packing=True and padding_free=True need their own collator: drop data_collator")
        self._trl_source = source_name(train_dataset)
        train_rows = self._trl_prepare(train_dataset, "train_dataset", settings, settings.packing)
        self._trl_eval_packing = settings.packing if settings.eval_packing is None else settings.eval_packing
        super().__init__(
            model=None if model_init is not None else model,
            args=settings,
            data_collator=data_collator
            or SequenceCollator(
                self._trl_tokenizer.pad_token_id, join=settings.padding_free, multiple=settings.multiple
            ),
            train_dataset=train_rows,
            eval_dataset=self._trl_prepare_eval(eval_dataset, settings),
            processing_class=self._trl_tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Counted in labels[:, 1:], as compute_loss does: nothing predicts a row's first token.
        self._loss_shifts_labels = not self._trl_seq2seq
        self._set_signature_columns_if_needed()
        self._signature_columns += ["seq_lengths", "prompt_ids"]
        if isinstance(self.train_dataset, ConstantLengthDataset):
            self.train_dataset.infinite = self.args.max_steps > 0

    # --- Data ---

    def _trl_prepare_eval(self, dataset: Any, settings: SFTConfig) -> Any:
        if isinstance(dataset, Mapping):
            return {
                name: self._trl_prepare(part, f"eval_dataset[{name!r}]", settings, self._trl_eval_packing)
                for name, part in dataset.items()
            }
        return self._trl_prepare(dataset, "eval_dataset", settings, self._trl_eval_packing)

    def _trl_prepare(self, dataset: Any, name: str, settings: SFTConfig, packing: bool) -> Any:
        """Turns a data set into rows of tokens; one that is ready stays as it is."""
        if dataset is None or (settings.dataset_kwargs or {}).get("skip_prepare_dataset"):
            return dataset
        streamed = is_hub_stream(dataset)
        if isinstance(dataset, Dataset) and not streamed:
            return dataset  # torch's: it yields what the collator takes
        field, formatting = self._trl_text_field, self._trl_formatting
        if self._trl_old_packing is not None:
            if field is None and formatting is None:
                raise ValueError(
                    "packing=True needs dataset_text_field or formatting_func, to know a row's text; "
                    "SFTConfig(packing=True) packs rows of any format"
                )
            if isinstance(dataset, str | Path):
                dataset = [row for _, row in open_source(dataset, name)]
            return ConstantLengthDataset(
                self._trl_tokenizer,
                dataset,
                dataset_text_field=field,
                formatting_func=formatting,
                seq_length=self._trl_max_length or 1024,
                seed=settings.seed,
                **self._trl_old_packing,
            )
        strategy = cast(Strategy, settings.packing_strategy)
        finish = _Packing(self._trl_max_length, strategy) if packing else _as_it_is
        encoder = self._trl_encoder(settings, packing)
        if streamed:
            if settings.max_steps <= 0 and name == "train_dataset":
                raise ValueError("train_dataset is a stream of unknown length: set max_steps")
            return StreamedRows(_Located(dataset, name), encoder, finish)
        rows: Iterable[Located] = open_source(dataset, name)
        if settings.shuffle_dataset and name == "train_dataset":
            rows = _shuffled(list(rows), settings.seed)
        tokens = TokenRows(encoder(rows))
        if encoder.dropped:
            logger.warning(
                "%s: left out %d rows of which no token counts, mostly since max_length=%s cut off all of their "
                "completion",
                name,
                encoder.dropped,
                self._trl_max_length,
            )
        if not len(tokens):
            raise ValueError(f"{name} has no rows to train on")
        return finish(tokens)

    def _trl_encoder(self, settings: SFTConfig, packing: bool) -> RowEncoder:
        formatting = self._trl_formatting
        named = self._trl_text_field is not None
        return RowEncoder(
            tokenizer=self._trl_tokenizer,
            text_field=self._trl_text_field or settings.dataset_text_field,
            completion_only=settings.completion_only_loss,
            assistant_only=settings.assistant_only_loss,
            separate_prompts=self._trl_seq2seq,
            max_length=None if packing else self._trl_max_length,
            keep="end" if settings.truncation_mode == "keep_end" else "start",
            formatting=None if named else formatting,
            formatting_batches=self._trl_batches,
            expected=DataFormat("language_modeling", False) if named else None,
        )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates on the given data set, prepared as the constructor does, or on the constructor's."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._trl_prepare_eval(eval_dataset, self.args)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # --- Loss ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the counted tokens of an optimizer step, and the metrics of this batch.

        Args:
            model: the model, possibly wrapped for its processes.
            inputs: a batch of `SequenceCollator`, or of another collator with `input_ids`, `labels` and
                `attention_mask`.
            return_outputs: also return the logits; for padded batches.
            num_items_in_batch: counted tokens of the optimizer step, on all processes; None for those of this batch.

        Returns:
            The loss, or a pair of the loss and a dictionary with the logits `[B, T, V]`.
        """
        rollout = supervised_rollout(self.model, inputs)
        result = evaluate(model, rollout, entropy=True, values=False, response_only=True, top1=True)
        assert result.entropy is not None and result.top1 is not None
        losses = Tally.of(TOKEN_LOSSES[self.args.loss_type](result.logprobs), rollout.mask)
        entropy, top1 = Tally.of(result.entropy.detach(), rollout.mask), Tally.of(result.top1.double(), rollout.mask)
        self.tally({"entropy": entropy, "mean_token_accuracy": top1})
        if not self.model.training:
            self.tally({"loss": losses})
        self.count_tokens(rollout.attention.sum())
        count = (
            losses.count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(losses.sum.device)
        )
        loss = losses.sum / count.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data-parallel wrappers average over processes
        return (loss, {"logits": self._trl_logits(model, inputs)}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """One batch of an evaluation; makes no logits unless `compute_metrics` needs them."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        with torch.no_grad(), self._trl_passes().passes():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _trl_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        if "attention_mask" not in inputs:
            raise ValueError("compute_metrics needs logits, which packed rows do not have: set eval_packing=False")
        logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return logits


def supervised_rollout(model: nn.Module, inputs: Mapping[str, Any]) -> Rollout:
    """Returns a batch of tokens and labels as sequences, one per row, and which of their tokens are counted.

    Args:
        model: tells whether an encoder reads `input_ids`.
        inputs: `input_ids` and `labels` `[B, T]`, and `attention_mask` `[B, T]` or `position_ids` `[B, T]`, which begin
            at 0 in each sequence of a joined row.

    Raises:
        ValueError: if there are no labels, or a label is neither the token itself nor -100.
    """
    if inputs.get("labels") is None:
        raise ValueError(f"the batch has {', '.join(inputs)}, but no labels: the collator must return them")
    tokens, labels = inputs["input_ids"], inputs["labels"]
    if is_encoder_decoder(model):
        counted = labels != IGNORED
        first = torch.full_like(labels[:, :1], start_token(base_language_model(model)))
        return Rollout(
            tokens=torch.cat([first, labels.masked_fill(~counted, 0)], dim=1),
            attention=torch.cat([torch.ones_like(counted[:, :1]), counted], dim=1),
            mask=counted,
            encoder_tokens=tokens,
            encoder_attention=inputs["attention_mask"].bool(),
        )
    if bool(((labels != IGNORED) & (labels != tokens)).any()):
        raise ValueError(
            f"labels differ from input_ids: a label must be the token itself, or {IGNORED} where it does not count"
        )
    if "attention_mask" not in inputs and "position_ids" in inputs:
        return _separated(tokens, labels, inputs["position_ids"])
    attention = (
        inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(tokens, dtype=torch.bool)
    )
    mask = (labels[:, 1:] != IGNORED) & attention[:, 1:] & attention[:, :-1]
    return Rollout(tokens=tokens, attention=attention, mask=mask)


def _separated(tokens: Tensor, labels: Tensor, positions: Tensor) -> Rollout:
    """Gives each sequence of joined rows a row of its own, padded on the right."""
    columns = positions.flatten()
    rows = (columns == 0).long().cumsum(dim=0) - 1
    shape = int(rows[-1]) + 1, int(columns.max()) + 1
    separated = tokens.new_zeros(shape).index_put((rows, columns), tokens.flatten())
    attention = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    attention[rows, columns] = True
    mask = torch.zeros_like(attention)
    mask[rows, columns] = (labels.flatten() != IGNORED) & (columns > 0)
    return Rollout(tokens=separated, attention=attention, mask=mask[:, 1:])


class _Packing:
    """Packs rows of tokens."""

    def __init__(self, length: int | None, strategy: Strategy) -> None:
        self.length, self.strategy = length or 0, strategy

    def __call__(self, rows: TokenRows) -> TokenRows:
        return rows.pack(self.length, self.strategy)


def _as_it_is(rows: TokenRows) -> TokenRows:
    return rows


class _Located:
    """Rows of a stream with their locations, from its beginning at each call."""

    def __init__(self, dataset: Iterable[Any], name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self) -> Iterator[Located]:
        return ((f"{self.name}[{index}]", row) for index, row in enumerate(self.dataset))


def _shuffled(rows: Sequence[Located], seed: int) -> list[Located]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    return [rows[index] for index in order.tolist()]


def _auto_class(model: Any, settings: SFTConfig) -> Any:
    """The auto class of a model given by its id: that of an encoder-decoder for those."""
    if not isinstance(model, str):
        return AutoModelForCausalLM
    trusted = bool(settings.init_kwargs.get("trust_remote_code", settings.trust_remote_code))
    options = {
        name: settings.init_kwargs[name] for name in ("revision", "cache_dir", "token") if name in settings.init_kwargs
    }
    config = AutoConfig.from_pretrained(model, trust_remote_code=trusted, **options)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _old_packing(packing: bool | None, given: Mapping[str, Any], settings: SFTConfig) -> dict[str, Any] | None:
    """Arguments of `ConstantLengthDataset` for TRL 0.4's `packing=True`; None without it."""
    named = [name for name, value in given.items() if value is not None and value != _OLD_DEFAULTS[name]]
    if packing and settings.packing:
        raise ValueError(
            "packing=True is an argument of SFTTrainer (texts of a row see each other) and a setting of SFTConfig "
            "(they do not): set only one of them"
        )
    if not packing:
        if named:
            raise ValueError(f"{', '.join(named)} are for SFTTrainer(packing=True): drop them")
        return None
    return {name: _OLD_DEFAULTS[name] if value is None else value for name, value in given.items()}


def _max_length(max_seq_length: int | None, settings: SFTConfig, tokenizer: Any, model: Any) -> int | None:
    """Tokens of a row: what is asked for, within what the tokenizer and the model's positions allow."""
    if max_seq_length is not None and max_seq_length < 2:
        raise ValueError(
            f"max_seq_length={max_seq_length} must be at least 2: the first token of a row is not predicted"
        )
    asked = settings.max_length if max_seq_length is None else max_seq_length
    limit = context_length(model)
    if asked is not None and limit is not None and asked > limit:
        level = logging.INFO if asked == SFTConfig.max_length else logging.WARNING
        logger.log(level, "rows have at most %d tokens, the model's context, not max_length=%d", limit, asked)
    limits = [length for length in (asked, limit) if length is not None]
    return min([*limits, int(tokenizer.model_max_length)]) if limits else None


def _set_chat_template(tokenizer: Any, settings: SFTConfig) -> None:
    path = settings.chat_template_path
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise ValueError(f"chat_template_path={path!r} does not exist")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    source = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    if not source.chat_template:
        raise ValueError(f"chat_template_path={path!r}: its tokenizer has no chat template")
    added = sorted(set(source.all_special_tokens) - set(tokenizer.get_vocab()))
    if added:
        raise ValueError(
            f"chat_template_path={path!r} needs the tokens {', '.join(added)}, which the model's tokenizer does not "
            "have: add them with trl.setup_chat_format(model, tokenizer), which resizes the model's embeddings, too"
        )
    tokenizer.chat_template = source.chat_template
