"""Rewards of single steps from a process reward model, which says of each step whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForTokenClassification

from trl.functional.step_labels import step_logits
from trl.pretrained import hub_arguments, load_model, load_tokenizer
from trl.rewards.classifier import check_vocabulary, joined_texts, length_limit, load_matching_tokenizer

DEFAULT_SEPARATOR = "\n"


class StepReward:
    """Scores the steps of a completion with a token classifier, such as one that `PRMTrainer` trained.

    A completion's steps are what `separator` separates; a last step without one gets it. The score of a step is that of
    its last token, the separator's. Where `reduce` is None, PPO gets it as the reward of the policy's token at which
    the step ends, so that credit goes to the step. Parts of white space alone are no steps; a completion without any is
    a single one.

    Args:
        model: a transformers token classifier with 1 or 2 outputs.
        tokenizer: the classifier's tokenizer; None loads it from where the model was loaded.
        separator: ends a step; None takes that of the training, which `model.config.step_separator` has, else a line
            break.
        output: "probability" that a step is right, or its "logit", which is below 0 for a step that is rather wrong.
        reduce: makes one score of a completion's, such as `min`; None gives rewards per token.
        policy_tokenizer: the policy's tokenizer, to find the tokens at which steps end; None takes `tokenizer`.
        batch_size: completions per forward pass; > 0.
        max_length: maximum tokens of prompt and completion; a prompt loses its beginning, and a completion that is too
            long has no score. None uses the limit of the tokenizer and model.

    Raises:
        ValueError: if an argument is out of range, no tokenizer can be loaded, or the tokenizer belongs to another
            model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        separator: str | None = None,
        output: Literal["probability", "logit"] = "probability",
        reduce: Callable[[Sequence[float]], float] | None = None,
        policy_tokenizer: Any = None,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        if output not in ("logit", "probability"):
            raise ValueError(f"output={output!r} is neither 'logit' nor 'probability'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        if separator == "":
            raise ValueError("separator='' separates nothing: give the text that ends a step")
        self.model = model.eval()
        self.tokenizer = load_matching_tokenizer(model) if tokenizer is None else tokenizer
        check_vocabulary(model, self.tokenizer)
        trained: str = getattr(model.config, "step_separator", DEFAULT_SEPARATOR)
        self.separator = trained if separator is None else separator
        self.output = output
        self.reduce = reduce
        self.policy_tokenizer = self.tokenizer if policy_tokenizer is None else policy_tokenizer
        self.batch_size = batch_size
        limits = [limit for limit in (length_limit(model, self.tokenizer), max_length) if limit is not None]
        self.max_length = min(limits, default=None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str,
        *,
        separator: str | None = None,
        output: Literal["probability", "logit"] = "probability",
        reduce: Callable[[Sequence[float]], float] | None = None,
        policy_tokenizer: Any = None,
        batch_size: int = 64,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
        **model_options: Any,
    ) -> StepReward:
        """Loads a token classifier and its tokenizer; see the class and `ClassifierReward.from_pretrained`."""
        model = load_model(AutoModelForTokenClassification, name_or_folder, allow_pickle=allow_pickle, **model_options)
        code = {key: model_options[key] for key in ("trust_remote_code", "code_revision") if key in model_options}
        tokenizer = load_tokenizer(name_or_folder, **hub_arguments(model_options), **code)
        return cls(
            model if device is None else model.to(device),
            tokenizer,
            separator=separator,
            output=output,
            reduce=reduce,
            policy_tokenizer=policy_tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Any]:
        """Scores completions, for PPO.

        Args:
            prompts: `B` prompts, possibly "".
            completions: `B` completions, each appended to its prompt without a separator.
            completion_ids: their tokens in the policy's tokenization; read only where `reduce` is None.
            columns: other dataset columns; unused.

        Returns:
            For each sample what `reduce` returns, or a number per token: a step's score at its last token, else 0; a
            `ValueError` where a text is longer than the model reads.

        Raises:
            ValueError: if the lengths differ, a text is no string, or the tokens of a completion are not those of its
                text.
        """
        joined_texts(prompts, completions)
        parts = [split_steps(completion, self.separator) for completion in completions]
        scores = self._score(prompts, [[text for text, _ in steps] for steps in parts])
        answers: list[Any] = []
        for row, steps in enumerate(parts):
            found = scores[row]
            if isinstance(found, ValueError):
                answers.append(found)
            elif self.reduce is not None:
                answers.append(self.reduce(found))
            elif not completion_ids[row] and not completions[row]:
                answers.append([])
            else:
                rewards = [0.0] * len(completion_ids[row])
                ends = [end for _, end in steps]
                for token, score in zip(
                    self._last_tokens(completion_ids[row], completions[row], ends), found, strict=True
                ):
                    rewards[token] += score
                answers.append(rewards)
        return answers

    def steps(self, prompts: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores steps.

        Args:
            prompts: `B` prompts.
            steps: the steps of each, without separators.

        Returns:
            `B` lists of a score per step.

        Raises:
            ValueError: if a prompt and its steps are longer than the model reads.
        """
        scores = self._score(prompts, steps)
        for row in scores:
            if isinstance(row, ValueError):
                raise row
        return [row for row in scores if not isinstance(row, ValueError)]

    def _score(self, prompts: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[float] | ValueError]:
        scores: list[list[float] | ValueError] = []
        texts: list[tuple[list[int], list[int]]] = []  # tokens, and the position of each step's last one
        for prompt, parts in zip(*step_tokens(self.tokenizer, prompts, steps, self.separator), strict=True):
            ids = [token for part in parts for token in part]
            if self.max_length is not None and len(ids) > self.max_length:
                scores.append(
                    ValueError(
                        f"steps of {len(ids)} tokens, but the reward model reads at most {self.max_length}: limit "
                        "max_new_tokens"
                    )
                )
                continue
            kept = prompt if self.max_length is None else prompt[max(0, len(prompt) + len(ids) - self.max_length) :]
            ends = torch.tensor([len(part) for part in parts]).cumsum(0) + len(kept) - 1
            texts.append(([*kept, *ids], ends.tolist()))
            scores.append([])
        places = [row for row, score in enumerate(scores) if not isinstance(score, ValueError)]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index][0]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, row in zip(batch, self._forward([texts[index] for index in batch]), strict=True):
                scores[places[index]] = row
        return scores

    @torch.no_grad()
    def _forward(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        self.model.eval()
        width = max(len(ids) for ids, _ in texts)
        pad = self.tokenizer.pad_token_id or 0  # padding is on the right and masked: any token
        tokens = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids, _ in texts])
        attention = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in texts])
        device = next(self.model.parameters()).device
        outputs = self.model(input_ids=tokens.to(device), attention_mask=attention.to(device)).logits
        logits = step_logits(outputs.float())  # [B, T]
        scores = logits.sigmoid() if self.output == "probability" else logits
        return [scores[row, ends].tolist() for row, (_, ends) in enumerate(texts)]

    def _last_tokens(self, ids: Sequence[int], completion: str, ends: Sequence[int]) -> list[int]:
        """Finds the token at which the text of `completion` reaches each offset in `ends`, by decoding prefixes."""

        def length(count: int) -> int:
            return len(self.policy_tokenizer.decode(list(ids[:count]), skip_special_tokens=True))

        if not ids or self.policy_tokenizer.decode(list(ids), skip_special_tokens=True) != completion:
            raise ValueError(
                f"the {len(ids)} tokens of a completion are not those of its text {completion[:60]!r} by the tokenizer "
                "that should find where steps end: pass the policy's as policy_tokenizer, or one score per completion "
                "with reduce"
            )
        places = []
        for end in ends:
            low, high = 1, len(ids)  # the least number of tokens whose text reaches `end`
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if length(middle) >= end else (middle + 1, high)
            places.append(low - 1)
        return places


def split_steps(completion: str, separator: str) -> list[tuple[str, int]]:
    """Returns the steps of a completion without separators, and the offset in the completion at which each ends."""
    steps, start = [], 0
    while start < len(completion):
        found = completion.find(separator, start)
        end = len(completion) if found < 0 else found + len(separator)
        text = completion[start : found if found >= 0 else end]
        if text.strip():
            steps.append((text, end))
        start = end
    return steps or [(completion, len(completion))]


def step_tokens(
    tokenizer: Any, prompts: Sequence[str], steps: Sequence[Sequence[str]], separator: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Tokenises prompts and steps, each on its own, so that the tokens of a step do not depend on its neighbours.

    Args:
        tokenizer: the classifier's tokenizer; prompts get its special tokens.
        prompts: `B` prompts, possibly "".
        steps: the steps of each, without separators.
        separator: added to each step.

    Returns:
        `B` prompts, and the steps of each, as token ids.

    Raises:
        ValueError: if a step has no tokens.
    """
    if not prompts:
        return [], []
    heads: list[list[int]] = tokenizer(list(prompts), verbose=False)["input_ids"]
    ending: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    texts = [text for parts in steps for text in parts]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    parts = [[[*next(encoded), *ending] for _ in row] for row in steps]
    for row, tokens in zip(steps, parts, strict=True):
        if empty := [text for text, ids in zip(row, tokens, strict=True) if not ids]:
            raise ValueError(
                f"the step {empty[0]!r} has no tokens, nor has the separator {separator!r}: set another separator"
            )
    return heads, parts
