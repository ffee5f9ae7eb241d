"""Loads the language model under a value head from a folder or hub id, with or without a PEFT adapter."""

from __future__ import annotations

from typing import Any

from trl.models import adapters, loading
from trl.pretrained import ADAPTER_CONFIG, cache_if_unreachable, check_adapter_format, commit_of, hub_arguments


def load_trunk(
    parent: Any, source: str, *model_args: Any, is_trainable: bool, allow_pickle: bool, **kwargs: Any
) -> tuple[Any, bool, dict[str, str | None]]:
    """Loads a plain language model, or a trained PEFT adapter on top of its base model.

    Args:
        parent: a transformers auto class.
        source: folder or hub id.
        *model_args: passed to transformers.
        is_trainable: continue training the adapter.
        allow_pickle: read legacy `.bin` files.
        **kwargs: passed to transformers.

    Returns:
        The model, whether it has an adapter, and the commit of each hub id that was read (None for a folder).

    Raises:
        ValueError: for pickled weights without `allow_pickle`, or an adapter without a base model.
        ImportError: for an adapter when peft is not installed.
    """
    hub = hub_arguments(kwargs)
    config = loading.read_adapter_config(source, hub)
    if config is None:
        model = loading.load_language_model(parent, source, *model_args, allow_pickle=allow_pickle, **kwargs)
        return model, False, {source: commit_of(source, "config.json", hub)}
    adapters.require_peft(f"the PEFT adapter {source!r}")
    check_adapter_format(source, hub, allow_pickle=allow_pickle)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"adapter_config.json of {source!r} has no base_model_name_or_path")
    # `revision` and `subfolder` locate the adapter, not its base model.
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if config.get("revision"):
        kwargs["revision"] = config["revision"]
    model = loading.load_language_model(parent, base, *model_args, allow_pickle=allow_pickle, **kwargs)
    commits = {
        source: commit_of(source, ADAPTER_CONFIG, hub),
        base: commit_of(base, "config.json", hub_arguments(kwargs)),
    }
    with cache_if_unreachable(source):
        return adapters.load_adapter(model, source, is_trainable=is_trainable, **hub), True, commits
