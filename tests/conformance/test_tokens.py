"""Tokens and sampling: lines 2 to 10 and 48 of the list of what PPO codebases have got wrong (line 1 is in test_models.py)."""

from __future__ import annotations

import re
import statistics
import string
import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

from tests.conformance.setting import (
    RESPONSE_LENGTHS,
    gradients_of,
    language_model,
    make_batch,
    make_trainer,
    on_responses,
    plain_logprobs,
    scalars,
    weights_of,
    with_value_head,
)
from tests.helpers import assert_close, tiny_tokenizer
from trl.models import create_reference_model, evaluate
from trl.trainer import PPOConfig
from trl.types import Rollout

pytestmark = pytest.mark.conformance


# --- 2, 3: scoring what was sampled -------------------------------------------------------------------------------


def _sampled(model: Any, queries: list[Tensor], temperature: float) -> tuple[Rollout, Tensor]:
    """Eight new tokens per query, left-padded, and the log-probabilities that the sampler itself reports, [B, 8]."""
    width = max(len(q) for q in queries)
    tokens = torch.stack([torch.cat([q.new_full((width - len(q),), 0), q]) for q in queries])
    attention = torch.stack([torch.arange(width) >= width - len(q) for q in queries])
    torch.manual_seed(3)
    output = model.generate(
        input_ids=tokens,
        attention_mask=attention.long(),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=8,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    seen = torch.stack([torch.log_softmax(s.double(), dim=-1) for s in output.scores], dim=1)  # [B, 8, V]
    new = output.sequences[:, -8:]
    logprobs = seen.gather(-1, new[..., None])[..., 0]
    columns = torch.arange(output.sequences.shape[1] - 1)
    mask = (columns >= output.sequences.shape[1] - 9).expand(len(queries), -1)
    if model.config.is_encoder_decoder:
        everything = torch.ones_like(output.sequences).bool()
        rollout = Rollout(
            tokens=output.sequences,
            attention=everything,
            mask=mask,
            encoder_tokens=tokens,
            encoder_attention=attention,
        )
    else:
        seen_and_new = torch.cat([attention, torch.ones_like(new).bool()], dim=1)
        rollout = Rollout(tokens=output.sequences, attention=seen_and_new, mask=mask)
    return rollout, logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_02_scoring_reproduces_sampling_logprobs(architecture: str, temperature: float) -> None:
    """Off by one column, positions counted over the padding, or a forgotten temperature: then the first ratio is not 1
    and PPO corrects a difference that does not exist. The sampler's own numbers are the judge.
    """
    model = language_model(architecture)
    rollout, sampled = _sampled(model, make_batch(4)[0], temperature)
    assert float(sampled.std()) > 0.1
    for scorer in (model, with_value_head(model)):
        for response_only in (False, True):
            with torch.no_grad():
                scored = evaluate(scorer, rollout, temperature=temperature, response_only=response_only)
            assert_close(scored.logprobs[rollout.mask].view_as(sampled), sampled)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_02_a_whole_step_sees_the_logprobs_of_its_own_sampler(padding_side: str) -> None:
    """Through the public face: what `generate` sampled is what `step` scores, token by token, whoever pads where."""
    trainer = make_trainer(tokenizer=tiny_tokenizer(padding_side), batch_size=4, mini_batch_size=2, temperature=0.8)
    queries, _, scores = make_batch(4)
    responses = trainer.generate(
        queries, return_prompt=False, do_sample=True, top_k=0, temperature=0.8, max_new_tokens=6
    )
    expected = [plain_logprobs(language_model(), q, r, 0.8) for q, r in zip(queries, responses)]
    stats = trainer.step(queries, list(responses), scores)
    assert_close(on_responses(stats["objective/logprobs"], queries, responses, padding_side), torch.cat(expected))
    assert_close(stats["objective/kl"], 0.0)


def test_03_policy_old_and_reference_logits_are_all_divided_by_the_temperature() -> None:
    """Divided in the sampler alone, the KL is that of two other distributions; divided in one of the two policies, the
    ratio starts off 1.
    """
    policy, reference = language_model(seed=0), language_model(seed=1)
    trainer = make_trainer(
        model=with_value_head(policy),
        reference=with_value_head(reference),
        temperature=0.5,
        learning_rate=0.0,
        mini_batch_size=2,
    )
    queries, responses, scores = make_batch()
    mine = [plain_logprobs(language_model(seed=0), q, r, 0.5) for q, r in zip(queries, responses)]
    theirs = [plain_logprobs(language_model(seed=1), q, r, 0.5) for q, r in zip(queries, responses)]
    stats = trainer.step(queries, responses, scores)
    assert_close(on_responses(stats["objective/logprobs"], queries, responses), torch.cat(mine))
    assert_close(on_responses(stats["objective/ref_logprobs"], queries, responses), torch.cat(theirs))
    assert_close(stats["objective/kl"], statistics.fmean(float((p - q).sum()) for p, q in zip(mine, theirs)))
    ratio, advantages = (torch.as_tensor(stats[f"ppo/policy/{name}"]) for name in ("ratio", "advantages"))
    assert_close(ratio[advantages != 0], torch.ones(sum(RESPONSE_LENGTHS)))
    assert_close(stats["ppo/policy/approxkl"], 0.0)


# --- 5, 6, 7: where a response ends -------------------------------------------------------------------------------


def _tokenizer_with(pad: int, eos: int = 1) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = f"w{pad}", f"w{eos}"
    return tokenizer


def test_05_with_pad_equal_to_eos_a_generated_eos_stays_an_action() -> None:
    """`mask = tokens != pad_id` drops the very token that ends a response, so that no model ever learns to stop.

    The same batch with another pad token must give the same numbers to the last bit.
    """
    queries, responses, scores = make_batch()
    responses = [torch.cat([r, torch.tensor([1])]) for r in responses]  # each ends with eos ...
    responses[2][1] = 1  # ... one has it inside as well
    queries[1][0] = 1  # ... and so has a query
    outcomes = []
    for pad in (1, 0, 5):
        trainer = make_trainer(tokenizer=_tokenizer_with(pad))
        masks = trainer.batched_forward_pass(
            trainer.model, queries, responses, trainer.prepare_model_inputs(queries, responses)
        )[3]
        assert masks.sum(dim=1).tolist() == [len(r) for r in responses]
        stats = trainer.step(queries, responses, scores)
        outcomes.append((scalars(stats), weights_of(trainer)))
    for numbers, weights in outcomes[1:]:
        assert numbers == outcomes[0][0]
        for name, weight in weights.items():
            assert torch.equal(weight, outcomes[0][1][name]), name


def test_05_the_logprob_of_the_final_eos_is_learnt_from() -> None:
    """With a positive advantage on the eos alone, one step makes ending more likely."""
    trainer = make_trainer(
        tokenizer=_tokenizer_with(pad=1), batch_size=2, mini_batch_size=2, sgd=True, init_kl_coef=0.0
    )
    query, ended, other = torch.tensor([5, 6, 7]), torch.tensor([9, 1]), torch.tensor([9, 8])
    trunk = trainer.model.pretrained_model
    before = plain_logprobs(trunk, query, ended)[-1] - plain_logprobs(trunk, query, other)[-1]
    masks = [torch.tensor([0, 1])] * 2
    trainer.step([query, query], [ended, other], [torch.tensor(5.0), torch.tensor(-5.0)], response_masks=masks)
    assert plain_logprobs(trunk, query, ended)[-1] - plain_logprobs(trunk, query, other)[-1] > before


def _first_returns(responses: list[Tensor], scores: list[float], **settings: Any) -> float:
    """`ppo/returns/mean` where the KL weighs nothing and γ = λ = 1: the mean over tokens of their response's score."""
    size = len(responses)
    trainer = make_trainer(
        batch_size=size, mini_batch_size=size, init_kl_coef=0.0, lam=1.0, learning_rate=0.0, **settings
    )
    stats = trainer.step(make_batch(size)[0], responses, [torch.tensor(s) for s in scores])
    assert_close(stats["ppo/mean_scores"], statistics.fmean(scores))  # the score itself is reported as it came
    return float(stats["ppo/returns/mean"])


def _mean_over_tokens(responses: list[Tensor], scores: list[float]) -> float:
    return statistics.fmean(score for response, score in zip(responses, scores) for _ in response)


def test_06_truncated_and_finished_responses_are_told_apart_by_their_last_token() -> None:
    """A length equal to the batch's width is not truncation, and one below it is not an end."""
    widest_and_finished, short_and_cut = torch.tensor([9, 8, 7, 6, 1]), torch.tensor([9, 8])
    ended_inside_then_cut, just_eos = torch.tensor([9, 1, 8]), torch.tensor([1])
    responses = [widest_and_finished, short_and_cut, ended_inside_then_cut, just_eos]
    scores = [0.5, 1.0, -1.0, 2.0]
    observed = _first_returns(responses, scores, missing_eos_penalty=10.0)
    assert_close(observed, _mean_over_tokens(responses, [0.5, 1.0 - 10.0, -1.0 - 10.0, 2.0]))
    assert_close(_first_returns(responses, scores), _mean_over_tokens(responses, scores))


def test_07_a_missing_eos_penalty_honours_every_configured_stop_token() -> None:
    """Llama 3 and Qwen end a turn with another token than `tokenizer.eos_token_id`: each good answer was punished."""
    responses = [torch.tensor([9, 1]), torch.tensor([9, 8, 40]), torch.tensor([9, 8, 41]), torch.tensor([9])]
    scores = [1.0, 2.0, 3.0, 4.0]
    observed = _first_returns(responses, scores, missing_eos_penalty=1.0, stop_token_ids=[1, 40, 41])
    assert_close(observed, _mean_over_tokens(responses, [1.0, 2.0, 3.0, 4.0 - 1.0]))
    observed = _first_returns(responses, scores, missing_eos_penalty=1.0, stop_token_ids=[40])
    assert_close(observed, _mean_over_tokens(responses, [1.0 - 1.0, 2.0, 3.0 - 1.0, 4.0 - 1.0]))


def test_07_the_stop_tokens_of_the_models_generation_config_count_too() -> None:
    """That is where such models keep them: a list."""
    responses = [torch.tensor([9, 1]), torch.tensor([9, 8, 40]), torch.tensor([9, 8, 41])]
    model = language_model()
    model.generation_config.eos_token_id = [1, 40]
    observed = _first_returns(responses, [1.0, 2.0, 3.0], model=with_value_head(model), missing_eos_penalty=1.0)
    assert_close(observed, _mean_over_tokens(responses, [1.0, 2.0, 3.0 - 1.0]))


def test_07_generation_ends_at_each_of_them_and_keeps_it() -> None:
    """A response cut at the first one of several, or stripped of it, is not what was sampled."""
    trainer = make_trainer(batch_size=8)
    stops = list(range(20, 60))  # two words in three end a response
    torch.manual_seed(0)
    responses = trainer.generate(
        make_batch()[0], return_prompt=False, do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=stops
    )
    assert len({len(r) for r in responses}) > 1
    for response in responses:
        assert not set(response[:-1].tolist()) & set(stops)
        assert int(response[-1]) in stops or len(response) == 12


# --- 8, 9: nothing is lost ----------------------------------------------------------------------------------------


class _MuteTokenizer(PreTrainedTokenizerFast):
    """Refuses to turn tokens into text, or text into tokens."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a sampled action was decoded or re-encoded")

    __call__ = encode = decode = batch_decode = convert_ids_to_tokens = tokenize = _refuse


def test_08_tokens_in_tokens_out() -> None:
    """Decoded and encoded again, `w7 w7` may become one token: the log-probabilities are then of another response."""
    plain = tiny_tokenizer()
    tokenizer = _MuteTokenizer(tokenizer_object=plain.backend_tokenizer, padding_side="right")
    tokenizer.__dict__.update({k: v for k, v in plain.__dict__.items() if k.startswith("_special")})
    trainer = make_trainer(tokenizer=tokenizer)
    with pytest.raises(AssertionError, match="re-encoded"):
        tokenizer("w1")
    queries, _, scores = make_batch()
    responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=5)
    expected = [plain_logprobs(language_model(), q, r) for q, r in zip(queries, responses)]
    stats = trainer.step(queries, list(responses), scores)
    assert_close(on_responses(stats["objective/logprobs"], queries, responses), torch.cat(expected))


def test_09_responses_of_one_token_are_trained_on() -> None:
    """Refused by TRL 0.4.6; elsewhere an off-by-one leaves them without a trainable token."""
    trainer = make_trainer(batch_size=2, mini_batch_size=1, gradient_accumulation_steps=2, sgd=True)
    queries, responses = [torch.tensor([5, 6, 7]), torch.tensor([4])], [torch.tensor([1]), torch.tensor([9])]
    before = weights_of(trainer)
    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
    expected = torch.cat([plain_logprobs(language_model(), q, r) for q, r in zip(queries, responses)])
    assert_close(on_responses(stats["objective/logprobs"], queries, responses), expected)
    assert all(value == value for value in scalars(stats).values())
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


def test_09_a_batch_of_one_sample_of_one_token() -> None:
    """Every spread is that of a single number here: none may be NaN."""
    trainer = make_trainer(
        batch_size=1, mini_batch_size=1, use_score_scaling=True, use_score_norm=True, whiten_rewards=True
    )
    stats = trainer.step([torch.tensor([5, 6])], [torch.tensor([9])], [torch.tensor(0.7)])
    assert all(value == value for value in scalars(stats).values())
    assert all(bool(weight.isfinite().all()) for weight in weights_of(trainer).values())


def test_09_an_empty_response_is_refused_and_nothing_has_changed() -> None:
    """Silently dropped, scores slide on to the wrong responses."""
    trainer = make_trainer()
    queries, responses, scores = make_batch()
    responses[3] = torch.empty(0, dtype=torch.int64)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=r"responses\[3\].*empty"):
        trainer.step(queries, responses, scores)
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(("batch", "mini", "accumulation"), [(10, 4, 1), (8, 3, 1), (8, 2, 3), (2, 4, 1)])
def test_09_a_remainder_of_the_batch_is_refused_with_its_numbers(batch: int, mini: int, accumulation: int) -> None:
    """`int(batch_size / mini_batch_size)` minibatches leave the last two of ten samples untrained, at every step."""
    with pytest.raises(ValueError, match=rf"batch_size={batch}\b.*{mini}\b") as caught:
        PPOConfig(batch_size=batch, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
    assert "multiple" in str(caught.value)


@pytest.mark.parametrize("given", [0, 7, 9])
def test_09_a_batch_of_another_size_is_refused(given: int) -> None:
    trainer = make_trainer()
    queries, responses, scores = make_batch(9)
    with pytest.raises(ValueError, match=rf"queries.*{given}\b.*batch_size=8"):
        trainer.step(queries[:given], responses[:given], scores[:given])


@pytest.mark.parametrize("cut", [(8, 1), (2, 2), (1, 1), (1, 4)])
def test_09_every_sample_is_seen_once_an_epoch(cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However the batch is cut: each forward pass of the update is watched, its padding taken off."""
    trainer = make_trainer(mini_batch_size=cut[0], gradient_accumulation_steps=cut[1], ppo_epochs=2)
    seen: list[list[tuple[int, ...]]] = []

    def watched(model: Any, rollout: Rollout, **settings: Any) -> Any:
        seen.append([tuple(row[kept].tolist()) for row, kept in zip(rollout.tokens, rollout.attention)])
        return evaluate(model, rollout, **settings)

    monkeypatch.setattr("trl.algorithms.ppo.evaluate", watched)
    queries, responses, scores = make_batch()
    trainer.step(queries, responses, scores)
    whole = sorted(tuple(torch.cat([q, r]).tolist()) for q, r in zip(queries, responses))
    passes = len(seen) // 2
    assert all(len(rows) == cut[0] for rows in seen)
    for epoch in (seen[:passes], seen[passes:]):
        assert sorted(row for rows in epoch for row in rows) == whole


# --- 10: sampling that scoring does not know of -------------------------------------------------------------------


@pytest.mark.parametrize(
    "reshaping",
    [
        {"min_length": 6},
        {"min_new_tokens": 3},
        {"repetition_penalty": 1.3},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7]]},
        {"suppress_tokens": [7]},
        {"temperature": 0.7},
        {"repetition_penalty": 1.2, "min_length": 6},
    ],
    ids=lambda reshaping: " ".join(reshaping),
)
def test_10_a_setting_that_changes_sampling_unseen_is_named(reshaping: dict[str, Any]) -> None:
    """`min_length` forbids eos while sampling and not while scoring: the classic source of a negative KL."""
    trainer = make_trainer()
    settings = dict(do_sample=True, top_k=0, max_new_tokens=4) | reshaping
    with pytest.warns(UserWarning, match="sampled with") as caught:
        trainer.generate(make_batch(2)[0], **settings)
    (message,) = [str(w.message) for w in caught if "sampled with" in str(w.message)]
    for name, value in reshaping.items():
        assert re.search(rf"\b{name}={re.escape(repr(value))}", message)


def test_10_a_default_of_the_models_own_is_named_too() -> None:
    """`top_k=50` in a generation_config.json truncates without anyone having asked for it."""
    model = language_model()
    model.generation_config.top_k = 50
    trainer = make_trainer(model=with_value_head(model))
    with pytest.warns(UserWarning, match=r"top_k=50"):
        trainer.generate(make_batch(2)[0], do_sample=True, max_new_tokens=3)


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=True, top_k=0, top_p=1.0),
        dict(do_sample=True, top_k=0, temperature=1.0, min_length=-1, repetition_penalty=1.0),
        dict(do_sample=False),
    ],
)
def test_10_plain_sampling_and_greedy_decoding_are_not_warned_of(settings: dict[str, Any]) -> None:
    trainer = make_trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.generate(make_batch(2)[0], max_new_tokens=3, **settings)


def test_10_a_negative_kl_is_reported_when_it_happens() -> None:
    """Responses that the reference likes much better than the policy, which is said to have sampled them."""
    policy, reference = language_model(seed=0), language_model(seed=1)
    queries, _, scores = make_batch()
    with torch.no_grad():
        responses = []
        for query in queries:
            tokens = query
            for _ in range(6):
                tokens = torch.cat([tokens, reference(input_ids=tokens[None]).logits[0, -1:].argmax(-1)])
            responses.append(tokens[len(query) :])
    trainer = make_trainer(model=with_value_head(policy), reference=with_value_head(reference))
    with pytest.warns(UserWarning, match=r"objective/kl is -\d"):
        stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl"] < -1.0


def test_05_gradients_do_not_depend_on_what_pads() -> None:
    """Neither does the side: the pad token's own embedding gets no gradient from padding."""
    queries, responses, scores = make_batch(low=10)
    found = []
    for pad, side in ((0, "right"), (3, "right"), (0, "left"), (3, "left")):
        tokenizer = tiny_tokenizer(side)
        tokenizer.pad_token = f"w{pad}"
        model = with_value_head(language_model("llama"))
        trainer = make_trainer(model=model, reference=create_reference_model(model), tokenizer=tokenizer, sgd=True)
        trainer.step(queries, responses, scores)
        gradients = gradients_of(trainer)
        embedding = gradients["pretrained_model.model.embed_tokens.weight"]
        assert float(embedding[:10].abs().max()) == 0.0  # words that stand in no query and no response
        found.append(gradients)
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            assert_close(gradient, found[0][name])


# --- 48: where a response ends ------------------------------------------------------------------------------------


class _TwoInARow(StoppingCriteria):
    """Ends a row whose last two tokens add up to an odd number: neither of them is special."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, -1] + input_ids[:, -2]) % 2 == 1


_LETTERS = (string.ascii_letters + string.digits)[:61]
# Ways to name an end, given a word that greedy decoding chooses.
_ENDS: dict[str, Any] = {
    "argument": lambda word: {"eos_token_id": [60, word]},
    "generation_config": lambda word: {"generation_config": GenerationConfig(eos_token_id=[60, word])},
    "strings": lambda word: {"stop_strings": [_LETTERS[word]]},
    "strings without eos": lambda word: {"stop_strings": [_LETTERS[word]], "eos_token_id": None},
    "criterion": lambda word: {"stopping_criteria": [_TwoInARow()]},
    "criterion without eos": lambda word: {"stopping_criteria": [_TwoInARow()], "eos_token_id": None},
    "criterion for eos": lambda word: {"stopping_criteria": [EosTokenCriteria(word)]},
    "nothing": lambda word: {"eos_token_id": None},
    "beams": lambda word: {"eos_token_id": word, "num_beams": 2, "early_stopping": True},
    "beams and strings": lambda word: {
        "stop_strings": [_LETTERS[word]],
        "num_beams": 2,
        "early_stopping": True,
        "eos_token_id": None,
    },
    "the model's own": lambda word: {},
}


def _letters() -> PreTrainedTokenizerFast:
    """A tokenizer of 61 letters and digits, such as stop strings are looked for with."""
    words = Tokenizer(BPE({letter: i for i, letter in enumerate(_LETTERS)}, []))
    words.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize(
    ("architecture", "how"),
    [("gpt2", how) for how in _ENDS] + [("t5", "argument"), ("t5", "strings without eos"), ("t5", "beams")],
)
def test_48_a_response_ends_where_it_was_ended(architecture: str, how: str) -> None:
    """As it does when transformers is given that query alone, where nothing pads; whichever token pads."""
    model, tokenizer = language_model(architecture, spread=8.0), _letters()
    seq2seq = model.config.is_encoder_decoder
    queries, _, _ = make_batch(size=4)

    def alone(query: Tensor, **more: Any) -> list[int]:
        settings = {"do_sample": False, "max_new_tokens": 9, "tokenizer": tokenizer, "pad_token_id": 0}
        row = model.generate(query[None], attention_mask=torch.ones(1, len(query)).long(), **settings | more)[0]
        return row[0 if seq2seq else len(query) :].tolist()

    beams = {"num_beams": 2, "early_stopping": True} if "beams" in how else {}
    word = alone(queries[0], eos_token_id=None, **beams)[4]
    if how == "the model's own":
        model.generation_config.eos_token_id = word
    ends = _ENDS[how](word)
    expected = [alone(query, **ends) for query in queries]
    assert how == "nothing" or len({len(row) for row in expected}) > 1  # some rows are padded
    auto = with_value_head(model)
    trainer = make_trainer(model=auto, reference=create_reference_model(auto), tokenizer=tokenizer)
    asked = {"do_sample": False, "max_new_tokens": 9, "return_prompt": False, "batch_size": 4, **ends}
    for pad in (word, 0, expected[1][-2]):  # what ends a response, another token, one that stands within a response
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        assert [r.tolist() for r in trainer.generate(queries, **asked)] == expected
