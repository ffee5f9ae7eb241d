"""ChatML: giving a base model and its tokenizer a chat format, before it is fine-tuned on chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ChatMlSpecialTokens:
    """ChatML's special tokens and template: each turn is `<|im_start|>role`, a newline, the text, `<|im_end|>`."""

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"

    @property
    def system(self) -> str:
        """Start of a system message."""
        return f"{self.bos_token}system"

    @property
    def user(self) -> str:
        """Start of a user's message."""
        return f"{self.bos_token}user"

    @property
    def assistant(self) -> str:
        """Start of an answer."""
        return f"{self.bos_token}assistant"

    @property
    def chat_template(self) -> str:
        """Jinja template for `tokenizer.apply_chat_template`."""
        turn = "{{ '" + self.bos_token + "' + turn['role'] + '\\n' + turn['content'] + '" + self.eos_token + "\\n' }}"
        opening = "{{ '" + self.assistant + "\\n' }}"
        return (
            "{% for turn in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"
        )


FORMAT_MAPPING = {"chatml": ChatMlSpecialTokens}


def setup_chat_format(
    model: Any, tokenizer: Any, format: str | None = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Adds a chat format's special tokens and template; both arguments are changed in place.

    Args:
        model: a transformers model. Its embeddings are resized to the tokenizer, and the ids of its special tokens set.
        tokenizer: its tokenizer. A chat template that it has is replaced.
        format: "chatml".
        resize_to_multiple_of: makes the number of embeddings a multiple of this.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: if the format is unknown.
    """
    if format not in FORMAT_MAPPING:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMAT_MAPPING)}")
    chat = FORMAT_MAPPING[format]()
    tokenizer.add_special_tokens(
        {"bos_token": chat.bos_token, "eos_token": chat.eos_token, "pad_token": chat.pad_token}
    )
    tokenizer.chat_template = chat.chat_template
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    # A model that cannot generate has no generation config.
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
