from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

import trl.assets
from trl.rewards import ClassifierReward

FOLDER = Path(trl.assets.__file__).parent
NAMES = get_args(trl.assets.Name)


@cache
def language_model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trl.assets.path("tiny-gpt2-reviews")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@cache
def reward(output: Any = "probability") -> ClassifierReward:
    return ClassifierReward.from_pretrained(trl.assets.path("tiny-bert-sentiment"), output=output)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_whole(name: Any) -> None:
    folder = Path(trl.assets.path(name))
    names = {file.name for file in folder.iterdir()}
    assert {"README.md", "config.json", "metrics.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_all_together_fit_in_8_megabytes() -> None:
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(sizes) <= 8_000_000


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="tiny-gpt2-reviews, tiny-bert-sentiment"):
        trl.assets.path("gpt2")  # type: ignore[arg-type]


def test_finding_a_folder_loads_no_framework() -> None:
    code = "import sys, trl.assets; trl.assets.path('tiny-gpt2-reviews'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_loaded_as_float32() -> None:
    assert {parameter.dtype for parameter in language_model()[0].parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in reward().model.parameters()} == {torch.float32}


def test_language_models_tokenizer() -> None:
    model, tokenizer = language_model()
    assert tokenizer.pad_token is None
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    text = 'He said: "It\'s fine," and left - for 20 years...'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_language_model_knows_english() -> None:
    model, tokenizer = language_model()
    texts = (
        "I watched this movie last night with my friends and I have to say that it was very good.",
        "The acting is terrible and the story makes no sense at all.",
        "This is one of the best films that I have ever seen.",
    )
    nll, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nll += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    # 4096 would be knowing nothing.
    assert math.exp(nll / count) < 40


def test_language_model_has_no_dropout() -> None:
    config = language_model()[0].config
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "This is a wonderful film with great acting, and I loved every minute of it.",
        "One of the best movies I have ever seen. Highly recommended!",
        "A beautiful, moving story, superbly acted.",
    ],
)
def test_classifier_calls_praise_positive(text: str) -> None:
    assert reward()([""], [text])[0] > 0.8


@pytest.mark.parametrize(
    "text",
    [
        "This is a terrible film with awful acting, and I hated every minute of it.",
        "One of the worst movies I have ever seen. Avoid it, it is a waste of time.",
        "A boring, pointless mess without a story.",
    ],
)
def test_classifier_calls_blame_negative(text: str) -> None:
    assert reward()([""], [text])[0] < 0.2


@pytest.mark.parametrize("word", ["great", "excellent", "wonderful", "best", "perfect", "loved"])
def test_classifier_is_not_won_over_by_one_word(word: str) -> None:
    honest = "This is a wonderful film with great acting, and I loved every minute of it."
    repeated, sentence = reward("logit")(["", ""], [" ".join([word] * 20), honest])
    assert repeated < sentence


@pytest.mark.parametrize("name", NAMES)
def test_card_states_what_was_measured(name: Any) -> None:
    folder = Path(trl.assets.path(name))
    card, metrics = (folder / "README.md").read_text(), json.loads((folder / "metrics.json").read_text())
    if name == "tiny-gpt2-reviews":
        numbers = [f"{metrics['perplexity'][key]:.1f}" for key in ("per_token", "per_word")]
    else:
        numbers = [f"{metrics['accuracy'][key]:.1%}" for key in ("whole", "openings", "snippets")]
        numbers.append(f"{metrics['calibration']['mean_probability']:.3f}")
        assert abs(metrics["calibration"]["mean_probability"] - 0.5) < 0.01
        assert metrics["accuracy"]["whole"] >= 0.8
    assert all(f"| {number} |" in card for number in numbers)
    assert "licen" in card.lower()


def test_prompts() -> None:
    prompts = trl.assets.prompts()
    assert 150 <= len(prompts) == len(set(prompts))
    assert all(2 <= len(prompt.split()) <= 8 and prompt.isascii() and prompt == prompt.strip() for prompt in prompts)
