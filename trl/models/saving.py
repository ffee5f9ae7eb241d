"""Saves a value-head model: the language model (or adapter) in its standard format, the value head in its own file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trl.models.loading import VALUE_HEAD_FILE, VALUE_HEAD_PREFIX

_UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def save_value_head_model(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Implements `save_pretrained` of a value-head model.

    Args:
        wrapper: the value-head model.
        *args: the folder, then further positional arguments of the language model's `save_pretrained`.
        **kwargs: arguments of the language model's `save_pretrained`; `state_dict` may be the wrapper's; `push_to_hub`
            uploads the folder.

    Returns:
        The result of the upload; None without one.
    """
    folder, *rest = args or (kwargs.pop("save_directory"),)
    push = kwargs.pop("push_to_hub", False)
    upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs}
    is_main = kwargs.get("is_main_process", rest[0] if rest and not wrapper.is_peft_model else True)
    state = kwargs.pop("state_dict", None)
    if state is not None:
        plain = {k: v for k, v in state.items() if not k.startswith(VALUE_HEAD_PREFIX)}
        kwargs["state_dict"] = {k.removeprefix("pretrained_model."): v for k, v in plain.items()}
    else:
        state = wrapper.v_head.state_dict(prefix=VALUE_HEAD_PREFIX)
    if wrapper.is_peft_model:
        frozen = (wrapper.reward_adapter_name, wrapper.reference_adapter_name)  # they have folders of their own
        names = [name for name in wrapper.pretrained_model.peft_config if name not in frozen]
        kwargs.setdefault("selected_adapters", names)
    saved = kwargs.get("selected_adapters") or []

    wrapper.pretrained_model.save_pretrained(folder, *rest, **kwargs)
    if not is_main:
        return None
    save_head(state, folder)
    for name in saved:
        if name != "default":  # peft gives it a folder of its own, which from_pretrained then loads
            save_head(state, os.path.join(folder, name))
    if not push:
        return None
    repo_id = upload.pop("repo_id", os.path.basename(os.path.normpath(folder)))
    repo_id = make_repository(repo_id, private=upload.pop("private", None), token=upload.get("token"))
    return upload_folder(folder, repo_id=repo_id, **upload)


def save_head(state: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Writes the `v_head.*` entries of `state` to their own file in an existing folder."""
    from safetensors.torch import save_file

    head = {k: v.detach().cpu().contiguous() for k, v in state.items() if k.startswith(VALUE_HEAD_PREFIX)}
    save_file(head, os.path.join(folder, VALUE_HEAD_FILE), metadata={"format": "pt"})


def make_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Creates a hub repository if needed and returns its id `namespace/name`; a bare name goes to the token's user."""
    from huggingface_hub import HfApi

    return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def upload_folder(folder: Any, *, repo_id: str, token: str | None = None, **kwargs: Any) -> Any:
    """Uploads a folder's files to an existing hub repository."""
    from huggingface_hub import HfApi

    return HfApi(token=token).upload_folder(folder_path=os.fspath(folder), repo_id=repo_id, **kwargs)
