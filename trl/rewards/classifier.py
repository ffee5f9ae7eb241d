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
    kept in evaluation mode. Texts are batched by length; scores are returned in input order. The first texts of different
    lengths are scored alone and padded: where padding changes a score (a decoder whose config has another `pad_token_id`
    than the tokenizer, absolute positions padded on the left), only texts of one length share a batch, and a warning says so.

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
        self.tokenizer = _own_tokenizer(model) if tokenizer is None else tokenizer
        _check_vocabulary(model, self.tokenizer)
        self.label = _label_index(model, label)
        self.output = output
        self._many_hold = getattr(model.config, "problem_type", None) == "multi_label_classification"
        # Batching needs a padding token.
        self.batch_size = 1 if self.tokenizer.pad_token_id is None else batch_size
        limit = _length_limit(model, self.tokenizer)
        self.max_length = limit if max_length is None or (limit is not None and limit < max_length) else max_length
        self._pads: bool | None = None  # whether padding leaves scores as they are; None until it was tried

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
        chosen = {key: model_options[key] for key in ("trust_remote_code", "code_revision") if key in model_options}
        tokenizer = load_tokenizer(name_or_folder, **hub_arguments(model_options), **chosen)
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
        texts = _joined(prompts, completions)
        if not texts:
            return []
        encodings = self._encode(texts)
        lengths = [len(ids) for ids in encodings["input_ids"]]
        if 0 in lengths:
            raise ValueError(f"text {lengths.index(0)} has no tokens: {texts[lengths.index(0)]!r}")
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        if self._pads is None and self.batch_size > 1 and lengths[order[0]] < lengths[order[-1]]:
            self._pads = self._try_padding(_rows(encodings, [order[0]]), _rows(encodings, [order[0], order[-1]]))
        scores = [0.0] * len(texts)
        for rows in self._batches(order, lengths):
            for row, score in zip(rows, self._score(_rows(encodings, rows)).tolist(), strict=True):
                scores[row] = score
        return scores

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows that are scored together."""
        alike = [list(order)] if self._pads else [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
        for rows in alike:
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _try_padding(self, alone: _Encodings, beside_the_longest: _Encodings) -> bool:
        """Whether a text has the same logits alone as it has padded, but for rounding."""
        expected, found = self._logits(alone)[0], self._logits(beside_the_longest)[0]
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        same = bool(((found - expected).abs() <= tolerance * (1 + expected.abs())).all())
        if not same:
            logger.warning(
                "padding changes what the classifier says (logits %s become %s): only texts of one length share a batch, which "
                "is slower. Its config has pad_token_id=%s; the tokenizer pads with %s, on the %s",
                expected.tolist()[:4],
                found.tolist()[:4],
                getattr(getattr(self.model, "config", None), "pad_token_id", None),
                self.tokenizer.pad_token_id,
                self.tokenizer.padding_side,
            )
        return same

    def _encode(self, texts: list[str]) -> _Encodings:
        cut = {"truncation": True, "max_length": self.max_length} if self.max_length is not None else {}
        return dict(self.tokenizer(texts, **cut))

    def _score(self, batch: _Encodings) -> Tensor:
        logits = self._logits(batch)
        if self.output == "probability":
            one_of_all = logits.shape[-1] > 1 and not self._many_hold
            logits = logits.softmax(dim=-1) if one_of_all else logits.sigmoid()
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


def _rows(encodings: _Encodings, rows: Sequence[int]) -> _Encodings:
    return {key: [values[row] for row in rows] for key, values in encodings.items()}


def _joined(prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
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
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions")
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def _own_tokenizer(model: Any) -> Any:
    source = getattr(model.config, "_name_or_path", "")
    if not source:
        raise ValueError("the model was not loaded from anywhere that could have a tokenizer: pass tokenizer=")
    try:
        return load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {source!r} could not be loaded; pass tokenizer=: {error}") from error


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the classifier vectors for {rows}: it is another model's; "
            "pass the classifier's own"
        )


def _label_index(model: Any, label: str | int) -> int:
    names: dict[int, str] = {int(index): name for index, name in model.config.id2label.items()}
    known = ", ".join(f"{index}: {name}" for index, name in sorted(names.items()))
    if isinstance(label, str):
        found = [index for index, name in names.items() if name.lower() == label.lower()]
        if len(found) != 1:
            raise ValueError(f"label={label!r} names {len(found)} labels of this classifier, which has {known}")
        return found[0]
    if label not in names:
        raise ValueError(f"label={label} is not a label of this classifier, which has {known}")
    return label


def _length_limit(model: Any, tokenizer: Any) -> int | None:
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(known, default=None)
