"""Per-token records of a few samples of each step, for the report's heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trl.redaction import redact
from trl.types import ActorCritic, Experience

MAX_SAMPLES = 4  # per process and step: best, worst, furthest from the reference, first
MAX_TOKENS = 512  # of each response
_DIGITS = 5  # significant digits, enough for a heat map
_PARTIAL = "\ufffd"  # tokenizers decode an incomplete character to this

TokenRecord = Mapping[str, list[Any]]


def token_records(tokenizer: Any, experience: Experience, scores: Sequence[float | None]) -> dict[int, TokenRecord]:
    """Records of the batch's most telling samples on this process, by row.

    Args:
        tokenizer: decodes the tokens, one by one.
        experience: `B` sequences.
        scores: `B` totals; a sample without one is not recorded.

    Returns:
        For each chosen row the lists `text`, `reward`, `kl`, `advantage` and `value`, one entry per counted response
        token, up to `MAX_TOKENS`. A list is missing where the algorithm does not compute it.
    """
    arrays: dict[str, Tensor] = {"advantage": experience.advantages}
    if isinstance(experience, ActorCritic):
        arrays |= {"reward": experience.rewards, "value": experience.old_values}
    if experience.ref_logprobs is not None:
        arrays["kl"] = experience.old_logprobs - experience.ref_logprobs
    mask = experience.rollout.mask
    records: dict[int, TokenRecord] = {}
    for row in _chosen(scores, experience.kl):
        columns = mask[row].nonzero().flatten()[:MAX_TOKENS]
        texts = token_texts(tokenizer, experience.rollout.tokens[row, columns + 1].tolist())
        whole = "".join(texts)
        if redact(whole) != whole:
            continue  # a secret, which cannot be cut out of single tokens
        numbers = {name: array[row, columns].tolist() for name, array in sorted(arrays.items())}
        records[row] = {"text": texts} | {
            name: [float(f"{value:.{_DIGITS}g}") + 0.0 for value in values] for name, values in numbers.items()
        }
    return records


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Text that each token adds, special tokens included; a character of several tokens is that of the last of them."""

    def decode(first: int, end: int) -> str:
        text: str = tokenizer.decode(tokens[first:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    texts: list[str] = []
    context, shown = 0, 0  # previous token, which decides on spaces; first token not shown yet
    for end in range(1, len(tokens) + 1):
        before, text = decode(context, shown), decode(context, end)
        if text.endswith(_PARTIAL) and end < len(tokens):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            context, shown = shown, end
    return texts


def _chosen(scores: Sequence[float | None], kl: Tensor | None) -> list[int]:
    """Rows of the best and the worst score, of the largest KL, and the first, without repetition."""
    scored = [row for row, score in enumerate(scores) if score is not None]
    if not scored:
        return []
    values = {row: float(scores[row]) for row in scored}  # type: ignore[arg-type]  # scored rows have a score
    kls = [0.0] * len(scores) if kl is None else kl.tolist()
    rows = [max(scored, key=values.__getitem__), min(scored, key=values.__getitem__)]
    rows += [max(scored, key=kls.__getitem__), scored[0]]
    return list(dict.fromkeys(rows))[:MAX_SAMPLES]
