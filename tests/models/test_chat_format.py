"""`setup_chat_format`: tokens, template, embeddings and ids of ChatML."""

from __future__ import annotations

import pytest

from tests.helpers import VOCABULARY, tiny_gpt2, tiny_tokenizer
from trl import setup_chat_format

CHAT = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6 w7"}]


def test_model_and_tokenizer_agree() -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    assert setup_chat_format(model, tokenizer) == (model, tokenizer)
    start, end = VOCABULARY, VOCABULARY + 1
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (start, end, end)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (start, end, end)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 2


def test_number_of_embeddings_is_a_multiple() -> None:
    model, tokenizer = setup_chat_format(tiny_gpt2(), tiny_tokenizer(), resize_to_multiple_of=16)
    assert model.get_input_embeddings().num_embeddings == 64
    assert len(tokenizer) == VOCABULARY + 2


def test_template_writes_chatml() -> None:
    _, tokenizer = setup_chat_format(tiny_gpt2(), tiny_tokenizer())
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|im_start|>system\nw5<|im_end|>\n<|im_start|>user\nw6 w7<|im_end|>\n"
    opened = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert opened == text + "<|im_start|>assistant\n"


def test_starts_of_the_roles() -> None:
    from trl.models.utils import FORMAT_MAPPING, ChatMlSpecialTokens

    chat = FORMAT_MAPPING["chatml"]()
    assert chat == ChatMlSpecialTokens("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (chat.system, chat.user, chat.assistant) == (
        "<|im_start|>system",
        "<|im_start|>user",
        "<|im_start|>assistant",
    )


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="format='alpaca' must be one of chatml"):
        setup_chat_format(tiny_gpt2(), tiny_tokenizer(), format="alpaca")
