"""transformers' `generate` as an engine: where responses end, and what its rollouts say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tests.helpers import tiny_gpt2, tiny_llama, tiny_t5
from trl.rollout import LocalEngine, TransformersEngine, rollout_rows
from trl.types import Sampling

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10])]
PAD, EOS = 0, 1


class Scripted(nn.Module):
    """A model whose `generate` writes given rows, pads behind a stop token, and asks its criteria after each token."""

    def __init__(self, *rows: list[int], stop: int | None = EOS) -> None:
        super().__init__()
        self.rows, self.stop = rows, stop
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=stop)
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def generate(self, input_ids: Tensor, stopping_criteria: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        running = torch.ones(len(input_ids), dtype=torch.bool)
        for chosen in torch.tensor(self.rows).t():
            written = torch.where(running, chosen, PAD) if self.stop is not None else chosen
            input_ids = torch.cat([input_ids, written[:, None]], dim=1)
            ends = stopping_criteria(input_ids, None)
            running = running & ~ends & (chosen != (-1 if self.stop is None else self.stop))
            if not running.any():
                break
        return SimpleNamespace(sequences=input_ids)


def responses_of(model: Any, queries: list[Tensor] = QUERIES, **arguments: Any) -> list[list[int]]:
    rollout = TransformersEngine(model, pad_token=PAD, arguments=arguments).generate(queries, Sampling())
    rows, responses = rollout_rows(rollout)
    assert [row.tolist() for row in rows] == [query.tolist() for query in queries]
    return [response.tolist() for response in responses]


def test_a_stop_token_ends_a_response_and_stays() -> None:
    model = Scripted([4, EOS, 4, 4], [4, 4, 4, EOS], [EOS, 4, 4, 4])
    assert responses_of(model) == [[4, EOS], [4, 4, 4, EOS], [EOS]]


def test_without_a_stop_token_nothing_is_cut() -> None:
    """Neither at the pad token, nor at what was an eos elsewhere."""
    rows = ([4, PAD, 4, EOS], [PAD, 4, PAD, PAD], [EOS, EOS, 4, 4])
    assert responses_of(Scripted(*rows, stop=None), eos_token_id=None) == [list(row) for row in rows]


def test_a_sampled_pad_token_is_an_action() -> None:
    assert responses_of(Scripted([PAD, 4, EOS, 4], [4, PAD, PAD, PAD], [4, 4, 4, EOS])) == [
        [PAD, 4, EOS], [4, PAD, PAD, PAD], [4, 4, 4, EOS],
    ]  # fmt: skip


class After(StoppingCriteria):
    """Ends each row after the first of its `numbers` of calls: it counts, so that it must be asked once a token."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.calls = torch.tensor(numbers), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.numbers == self.calls


@pytest.mark.parametrize("stop", [EOS, None])
def test_a_criterion_ends_a_response(stop: int | None) -> None:
    """Where there is no stop token, `generate` goes on with a row that has ended: what it writes there was not asked for."""
    model = Scripted([4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7], stop=stop)
    criteria = StoppingCriteriaList([After(1, 4, 9), After(9, 3, 2)])
    assert responses_of(model, stopping_criteria=criteria) == [[4], [4, 5, 6], [4, 5]]


def test_ends_that_are_unknown_are_an_error() -> None:
    class Deaf(Scripted):
        def generate(self, **kwargs: Any) -> Any:
            return super().generate(**kwargs | {"stopping_criteria": lambda ids, scores: torch.tensor(False)})

    with pytest.raises(RuntimeError, match=r"Deaf\.generate ignores stopping_criteria"):
        responses_of(Deaf([4, EOS], [4, 4], [4, 4]))
    assert responses_of(Deaf([4, EOS]), QUERIES[:1]) == [[4, EOS]]


# What is asked for -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5], ids=["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    "request_of",
    [
        lambda: Sampling(greedy=True, limits=(6, 6, 3), stops=(1, 4, 9)),
        lambda: Sampling(greedy=True, limits=(6, 3, 6)),
        lambda: Sampling(greedy=True, limits=(6, 3, 6), stops=tuple(range(3, 40)), least_tokens=3),
    ],
    ids=["stops", "limits", "least length"],
)
def test_both_engines_make_the_same_rollout_of_a_request(build: Any, request_of: Any, side: Any) -> None:
    """Whatever else the model's generation config sets."""
    model = build()
    model.generation_config.update(repetition_penalty=1.7, min_length=7, num_beams=2)
    rollouts = [kind(model, side=side).generate(QUERIES, request_of()) for kind in (LocalEngine, TransformersEngine)]
    for name in ("tokens", "attention", "mask", "encoder_tokens", "encoder_attention"):
        ours, theirs = (getattr(rollout, name) for rollout in rollouts)
        assert torch.equal(ours, theirs) if ours is not None else theirs is None, name
    assert rollouts[1].sampler_logprobs is None and rollouts[1].values is None


def test_a_request_names_the_distribution() -> None:
    """With one word left by each cut, sampling is greedy."""
    model = tiny_gpt2(initializer_range=0.5)
    greedy = TransformersEngine(model).generate(QUERIES, Sampling(greedy=True, limits=(5, 5, 5))).tokens
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}):
        got = TransformersEngine(model).generate(QUERIES, Sampling(limits=(5, 5, 5), seed=0, **cut)).tokens
        assert torch.equal(got, greedy), cut


def test_a_seed_of_its_own_leaves_torch_s_numbers_alone() -> None:
    engine = TransformersEngine(tiny_gpt2())
    engine.update_weights(4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (engine.generate(QUERIES, Sampling(limits=(9, 9, 9), seed=n)) for n in (1, 1, 2))
    assert torch.rand(1) == expected
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert first.policy_version == 4
