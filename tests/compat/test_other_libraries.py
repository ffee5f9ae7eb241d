"""docs/migration.md, "Breaks of other libraries": what today's transformers and peft do with old code, row by row.

A failure here is not a defect of this library: it says that the page's row, and its remedy, need another look.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers import tiny_tokenizer
from trl import assets

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Breaks of other libraries")[2].partition("\n## ")[0]
GONE = ["load_tool", "AdamW", "deepspeed", "top_k_top_p_filtering"]


@pytest.mark.parametrize("name", GONE)
def test_names_of_transformers_are_gone(name: str) -> None:
    assert f"`transformers.{name}`" in TABLE
    with pytest.raises((AttributeError, ImportError)):
        getattr(transformers, name)


def test_their_remedies_are_there() -> None:
    import torch

    from trl.core import top_k_top_p_filtering

    assert callable(top_k_top_p_filtering) and torch.optim.AdamW
    assert importlib.import_module("transformers.integrations.deepspeed")


def test_a_pipeline_returns_the_best_label_alone_unless_top_k_is_none() -> None:
    assert "`pipeline(..., return_all_scores=True)`" in TABLE and "`top_k=None`" in TABLE
    classifier: Any = transformers.pipeline("text-classification", model=assets.path("tiny-bert-sentiment"), device=-1)
    text = ["a wonderful film"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (best,) = classifier(text, return_all_scores=True)
    (every,) = classifier(text, top_k=None)
    assert isinstance(best, dict) and isinstance(every, list) and len(every) == 2
    assert [entry["score"] for entry in every] == sorted((entry["score"] for entry in every), reverse=True)
    assert every[0]["label"] == best["label"]


def test_a_chat_template_returns_a_mapping_and_tokenizers_are_called() -> None:
    tokenizer = tiny_tokenizer()
    assert "`tokenizer.encode_plus`, `batch_encode_plus`" in TABLE and "`return_dict=False`" in TABLE
    assert not any(hasattr(tokenizer, name) for name in ("encode_plus", "batch_encode_plus"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = [{"role": "user", "content": "w40 w50"}]
    ids = tokenizer("w40 w50")["input_ids"]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == ids
    assert tokenizer.apply_chat_template(chat, return_dict=False) == ids


def test_peft_prepares_for_kbit_training() -> None:
    peft = pytest.importorskip("peft")
    assert "`peft.prepare_model_for_int8_training` | `peft.prepare_model_for_kbit_training`" in TABLE
    assert not hasattr(peft, "prepare_model_for_int8_training") and peft.prepare_model_for_kbit_training


def test_old_arguments_of_from_pretrained() -> None:
    """transformers' own classes refuse `load_in_8bit` and `use_auth_token`; ours take them (tests/models)."""
    assert "AutoModel….from_pretrained(load_in_8bit=True)" in TABLE and "`use_auth_token=`" in TABLE
    folder = assets.path("tiny-gpt2-reviews")
    for argument in ({"load_in_8bit": True}, {"use_auth_token": False}):
        with pytest.raises(TypeError, match=next(iter(argument))):
            transformers.AutoModelForCausalLM.from_pretrained(folder, **argument)
