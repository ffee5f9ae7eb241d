"""Reward from a text classifier or a reward model with a single output."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from trl.pretrained import hub_arguments, load_model, load_tokenizer

logger = logging.getLogger(__name__)

# Tokenizers without a length limit report a `model_max_length` at least this large.
_NO_LIMIT = 1_000_000

_Encodings: TypeAlias = Mapping[str, list[list[int]]]  # by name of the input, a list of each text's


class ClassifierReward:
    """Scores prompt + completion with a sequence classifier.

    The classifier uses its own tokenizer, never the policy's token ids: the two vocabularies can be unrelated. It is
    kept in evaluation mode. Texts are batched by length; scores are returned in input order. The first texts of
    different lengths are scored alone and padded: where padding changes a score (a decoder whose config has another
    `pad_token_id` than the tokenizer, absolute positions padded on the left), only texts of one length share a batch,
    and a warning says so.

    Args:
        model: a transformers sequence classifier: its output has `logits` [B, labels], its config `id2label`.
        tokenizer: the classifier's tokenizer; None loads it from where the model was loaded.
        label: label whose output is the score, by name (case-insensitive) or index. A reward model with a single output
            has label 0.
        output: "logit" is the label's raw output; "probability" is in [0, 1]: the softmax over the labels, or the
            sigmoid of a single output or of a multi-label classifier (`problem_type="multi_label_classification"`).
        batch_size: texts per forward pass; > 0.
        max_length: maximum tokens per text, special tokens included; longer texts are truncated on the tokenizer's
            `truncation_side` (usually the right, which loses the end of the completion). None uses the limit of the
            tokenizer and model; a larger value is reduced to it.

    Raises:
        ValueError: if the label is unknown, an argument is out of range, no tokenizer can be loaded, or the tokenizer
            has more tokens than the model has embeddings, so belongs to another model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        label: str | int = "POSITIVE",
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        if output not in ("logit", "probability"):
            raise ValueError(f"output={output!r} is neither 'logit' nor 'probability'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} is not positive")
        self.model = model.eval()
        self.tokenizer = load_matching_tokenizer(model) if tokenizer is None else tokenizer
        check_vocabulary(model, self.tokenizer)
        self.label = _label_index(model, label)
        self.output = output
        self._is_multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
        # Batching needs a padding token.
        self.batch_size = 1 if self.tokenizer.pad_token_id is None else batch_size
        limit = length_limit(model, self.tokenizer)
        self.max_length = limit if max_length is None or (limit is not None and limit < max_length) else max_length
        self._padding_is_safe: bool | None = None  # None until tried

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str,
        *,
        label: str | int = "POSITIVE",
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 64,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
        **model_options: Any,
    ) -> ClassifierReward:
        """Loads a classifier and its tokenizer.

        Args:
            name_or_folder: local folder or Hub model name.
            label: see the class.
            output: see the class.
            batch_size: see the class.
            max_length: see the class.
            device: device of the classifier; None leaves it where it was loaded.
            allow_pickle: without safetensors, load a legacy `pytorch_model.bin` with `weights_only=True`.
            model_options: passed to `AutoModelForSequenceClassification.from_pretrained`, which rejects unknown ones;
                e.g. `dtype`, `revision`, `device_map`. `trust_remote_code` defaults to False, for the tokenizer too.

        Returns:
            The reward.

        Raises:
            ValueError: if the weights are a pickle and `allow_pickle` is False, or the model or tokenizer needs custom
                code from the checkpoint and `trust_remote_code` is not True.
        """
        model = load_model(
            AutoModelForSequenceClassification, name_or_folder, allow_pickle=allow_pickle, **model_options
        )
        code_options = {
            key: model_options[key] for key in ("trust_remote_code", "code_revision") if key in model_options
        }
        tokenizer = load_tokenizer(name_or_folder, **hub_arguments(model_options), **code_options)
        if device is not None:
            model = model.to(device)
        return cls(model, tokenizer, label=label, output=output, batch_size=batch_size, max_length=max_length)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Scores texts.

        Args:
            prompts: `B` prompts, possibly "".
            completions: `B` completions, each appended to its prompt without a separator.
            columns: other dataset columns; unused.

        Returns:
            `B` scores: logits or probabilities of the label.

        Raises:
            ValueError: if the lengths differ, a prompt or completion is not a string, or a text has no tokens.
        """
        texts = joined_texts(prompts, completions)
        if not texts:
            return []
        encodings = self._encode(texts)
        lengths = [len(ids) for ids in encodings["input_ids"]]
        if 0 in lengths:
            raise ValueError(f"text {lengths.index(0)} has no tokens: {texts[lengths.index(0)]!r}")
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        if self._padding_is_safe is None and self.batch_size > 1 and lengths[order[0]] < lengths[order[-1]]:
            self._padding_is_safe = self._padding_keeps_scores(
                _select_rows(encodings, [order[0]]), _select_rows(encodings, [order[0], order[-1]])
            )
        scores = [0.0] * len(texts)
        for rows in self._batches(order, lengths):
            for row, score in zip(rows, self._score(_select_rows(encodings, rows)).tolist(), strict=True):
                scores[row] = score
        return scores

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yields the row indices of each batch."""
        groups = [list(order)]
        if not self._padding_is_safe:
            groups = [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
        for rows in groups:
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _padding_keeps_scores(self, unpadded: _Encodings, padded: _Encodings) -> bool:
        """Whether a text's logits are the same with and without padding, up to rounding."""
        unpadded_logits, padded_logits = self._logits(unpadded)[0], self._logits(padded)[0]
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        scores_equal = bool(((padded_logits - unpadded_logits).abs() <= tolerance * (1 + unpadded_logits.abs())).all())
        if not scores_equal:
            logger.warning(
                "padding changes the classifier's logits from %s to %s: only texts of equal length share a batch, "
                "which is slower. The model's config has pad_token_id=%s; the tokenizer pads with %s on the %s",
                unpadded_logits.tolist()[:4],
                padded_logits.tolist()[:4],
                getattr(getattr(self.model, "config", None), "pad_token_id", None),
                self.tokenizer.pad_token_id,
                self.tokenizer.padding_side,
            )
        return scores_equal

    def _encode(self, texts: list[str]) -> _Encodings:
        truncation = {"truncation": True, "max_length": self.max_length} if self.max_length is not None else {}
        return dict(self.tokenizer(texts, **truncation))

    def _score(self, batch: _Encodings) -> Tensor:
        logits = self._logits(batch)
        if self.output == "probability":
            single_label = logits.shape[-1] > 1 and not self._is_multi_label
            logits = logits.softmax(dim=-1) if single_label else logits.sigmoid()
        return logits[:, self.label]  # [B]

    @torch.no_grad()
    def _logits(self, batch: _Encodings) -> Tensor:
        self.model.eval()
        device = next(self.model.parameters()).device
        if len(batch["input_ids"]) > 1:
            inputs = self.tokenizer.pad(batch, return_tensors="pt")
        else:
            inputs = {key: torch.tensor(values) for key, values in batch.items()}
        logits: Tensor = self.model(**{key: values.to(device) for key, values in inputs.items()}).logits
        return logits.float()  # [B, labels]


def _select_rows(encodings: _Encodings, rows: Sequence[int]) -> _Encodings:
    return {key: [values[row] for row in rows] for key, values in encodings.items()}


def joined_texts(prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
    """Appends completions to their prompts; a wrong length, or a text that is no string, is a ValueError."""
    for name, texts in (("prompts", prompts), ("completions", completions)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is a string; expected a list of strings")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"{name}[{index}] is of type {type(text).__name__}, not str: a classifier has its own tokenizer "
                    "and reads text; decode token ids first"
                )
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions; expected equally many")
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def load_matching_tokenizer(model: Any) -> Any:
    """Loads the tokenizer from where a model was loaded; a ValueError where that is unknown or has none."""
    source = getattr(model.config, "_name_or_path", "")
    if not source:
        raise ValueError(
            "the classifier was not loaded from a folder or hub id, so its tokenizer is unknown: pass tokenizer="
        )
    try:
        return load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {source!r} could not be loaded; pass tokenizer=: {error}") from error


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises a ValueError if a tokenizer has more tokens than the model has embeddings."""
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the classifier embeds only {embeddings}: pass the "
            "classifier's own tokenizer"
        )


def _label_index(model: Any, label: str | int) -> int:
    names: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
    available = ", ".join(f"{index}: {name}" for index, name in sorted(names.items()))
    if isinstance(label, str):
        matches = [index for index, name in names.items() if name.lower() == label.lower()]
        if len(matches) != 1:
            raise ValueError(f"label={label!r} matches {len(matches)} labels of this classifier, which has {available}")
        return matches[0]
    if label not in names:
        raise ValueError(f"label={label} is not a label of this classifier, which has {available}")
    return label


def length_limit(model: Any, tokenizer: Any) -> int | None:
    """Maximum tokens of a text that tokenizer and model allow; None if they set no limit."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    finite_limits = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(finite_limits, default=None)
