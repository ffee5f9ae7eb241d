"""Rewards of single steps: what a step is, its score from the model alone, and the token of the policy that gets it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_tokenizer
from trl import assets
from trl.rewards import Sample, StepReward, as_reward
from trl.rewards.steps import split_steps, step_tokens

SEPARATOR = " w9"


def classifier(labels: int = 2, make: Any = tiny_llama) -> Any:
    kinds = {tiny_llama: transformers.LlamaForTokenClassification, tiny_gpt2: transformers.GPT2ForTokenClassification}
    config = copy.deepcopy(make().config)
    config.num_labels = labels
    torch.manual_seed(0)
    return kinds[make](config).eval()


def chance(model: Any, ids: list[int]) -> float:
    """Probability that the step that ends `ids` is right, by a pass without padding."""
    with torch.no_grad():
        last = model(input_ids=torch.tensor([ids])).logits[0, -1].double().tolist()
    if len(last) == 1:
        return 1 / (1 + math.exp(-last[0]))
    return math.exp(last[1]) / (math.exp(last[0]) + math.exp(last[1]))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a\nb\n", [("a", 2), ("b", 4)]),
        ("a\nb", [("a", 2), ("b", 3)]),
        ("\n\na b\n \nc", [("a b", 6), ("c", 9)]),
        ("", [("", 0)]),
        (" \n", [(" \n", 2)]),
    ],
)
def test_steps_of_a_completion(completion: str, expected: list[tuple[str, int]]) -> None:
    assert split_steps(completion, "\n") == expected


def test_tokens_of_a_step_do_not_depend_on_its_neighbours() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.path("tiny-gpt2-reviews"))
    prompts, steps = step_tokens(tokenizer, ["One and", ""], [["one", "two"], ["two"]], "\n")
    end = tokenizer("\n").input_ids
    assert prompts == [tokenizer("One and").input_ids, []]
    assert steps == [[tokenizer("one").input_ids + end, tokenizer("two").input_ids + end], [steps[0][1]]]
    with pytest.raises(ValueError, match=r"the step ' ' has no tokens, nor has the separator '\\n'"):
        step_tokens(tiny_tokenizer(), ["w5"], [["w6", " "]], "\n")


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_scores_are_those_of_the_model_alone(labels: int, make: Any) -> None:
    model = classifier(labels, make)
    reward = StepReward(model, tiny_tokenizer(), separator=SEPARATOR, batch_size=2)
    found = reward.steps(["w5 w6", "w7", "w4"], [["w4", "w8 w4"], ["w6"], ["w5 w5 w5 w5", "w7", "w8"]])
    heads = [[5, 6, 4, 9], [5, 6, 4, 9, 8, 4, 9]], [[7, 6, 9]]
    long = [4, 5, 5, 5, 5, 9, 7, 9, 8, 9]
    expected = [*heads, [long[:6], long[:8], long]]
    for row, texts in zip(found, expected, strict=True):
        assert_close(torch.tensor(row), torch.tensor([chance(model, ids) for ids in texts]), 1e-5)
    logits = StepReward(model, tiny_tokenizer(), separator=SEPARATOR, output="logit").steps(["w7"], [["w6"]])
    assert_close(torch.tensor(logits[0]).sigmoid(), torch.tensor([chance(model, [7, 6, 9])]), 1e-5)


def test_the_tokens_that_end_steps_get_the_scores() -> None:
    model = classifier()
    reward = StepReward(model, tiny_tokenizer(), separator=SEPARATOR)
    completions = [" w4 w9 w8 w4 w9", " w4 w9 w8", ""]
    ids = [[4, 9, 8, 4, 9, 1], [4, 9, 8], [1]]  # w1 is the eos token, which is not part of the text
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    first, second, empty = reward(["w5"] * 3, texts, ids)
    assert_close(
        torch.tensor(first), torch.tensor([0, chance(model, [5, 4, 9]), 0, 0, chance(model, [5, 4, 9, 8, 4, 9]), 0])
    )
    assert_close(torch.tensor(second), torch.tensor([0, chance(model, [5, 4, 9]), chance(model, [5, 4, 9, 8, 9])]))
    assert_close(torch.tensor(empty), torch.tensor([chance(model, [5, 9])]))
    assert reward(["w5"], [""], [[]]) == [[]]
    least = StepReward(model, tokenizer, separator=SEPARATOR, reduce=min)(["w5"] * 2, completions[:2], ids[:2])
    assert_close(torch.tensor(least), torch.tensor([min(x for x in row if x) for row in (first, second)]))


def test_a_policy_with_other_tokens() -> None:
    """Step ends are found in the policy's own tokens, whatever the classifier's are."""
    policy = transformers.AutoTokenizer.from_pretrained(assets.path("tiny-gpt2-reviews"))
    text = " A fine film, and w5.\nWonderful — naïve w6 …\nw7"
    ids = policy(text).input_ids
    reward = StepReward(classifier(), tiny_tokenizer(), policy_tokenizer=policy)
    (row,) = reward([""], [text], [ids])
    ends = [index for index, score in enumerate(row) if score]
    assert [policy.decode(ids[: end + 1]) for end in ends] == [
        text[: text.index("\n") + 1],
        text[: text.rindex("\n") + 1],
        text,
    ]
    with pytest.raises(ValueError, match="pass the policy's as policy_tokenizer"):
        StepReward(classifier(), tiny_tokenizer())([""], [text], [ids])


def test_texts_that_are_too_long() -> None:
    model = classifier()
    reward = StepReward(model, tiny_tokenizer(), separator=SEPARATOR, max_length=6, reduce=min)
    long = " w4" * 6
    short, failed = reward(["w5 w6 w7 w8", "w5"], [" w4 w4 w4", long], [[], []])
    assert_close(short, chance(model, [7, 8, 4, 4, 4, 9]))  # a prompt loses its beginning
    assert isinstance(failed, ValueError) and "steps of 7 tokens, but the reward model reads at most 6" in str(failed)
    samples = [
        Sample(prompt="w5", completion=text, prompt_ids=(5,), completion_ids=(4,), columns={}) for text in (" w4", long)
    ]
    scored = as_reward(reward, on_error="skip").score(samples)
    assert scored.scores[0] is not None and scored.scores[1] is None and "7 tokens" in str(scored.errors[1])
    with pytest.raises(ValueError, match="steps of 7 tokens"):
        reward.steps(["w5"], [[long]])


def test_the_separator_of_the_training_is_saved(tmp_path: Path) -> None:
    model = classifier()
    assert StepReward(model, tiny_tokenizer()).separator == "\n"
    model.config.step_separator = SEPARATOR
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = StepReward.from_pretrained(str(tmp_path))
    assert loaded.separator == SEPARATOR
    assert StepReward.from_pretrained(str(tmp_path), separator="\n").separator == "\n"
    assert_close(loaded.steps(["w5"], [["w4"]])[0], [chance(model, [5, 4, 9])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "score"}, "output='score' is neither"),
        ({"batch_size": 0}, "batch_size=0 is not positive"),
        ({"separator": ""}, "separator='' separates nothing"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepReward(classifier(), tiny_tokenizer(), **options)
