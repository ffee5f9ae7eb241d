"""The language model under a value head, from whatever folder or hub id holds it."""

from __future__ import annotations

from typing import Any

from trl.models import adapters, loading
from trl.pretrained import ADAPTER_CONFIG, check_adapter_format, commit_of, hub_arguments


def load_trunk(
    parent: Any, source: str, *model_args: Any, is_trainable: bool, allow_pickle: bool, **kwargs: Any
) -> tuple[Any, bool, dict[str, str | None]]:
    """A plain language model, or a trained PEFT adapter on its base.

    Args:
        parent: a transformers auto class.
        source: folder or hub id.
        *model_args: transformers' own.
        is_trainable: go on training the adapter.
        allow_pickle: read legacy `.bin` files.
        **kwargs: transformers' own.

    Returns:
        The model, whether it carries an adapter, and the commit of each hub id that was read (None for a folder).

    Raises:
        ValueError: for weights in a pickle without `allow_pickle`, or an adapter that names no base.
        ImportError: for an adapter without peft.
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
        raise ValueError(f"adapter_config.json of {source!r} names no base_model_name_or_path")
    # `revision` and `subfolder` say where the adapter is, not its base.
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if config.get("revision"):
        kwargs["revision"] = config["revision"]
    model = loading.load_language_model(parent, base, *model_args, allow_pickle=allow_pickle, **kwargs)
    commits = {
        source: commit_of(source, ADAPTER_CONFIG, hub),
        base: commit_of(base, "config.json", hub_arguments(kwargs)),
    }
    return adapters.load_adapter(model, source, is_trainable=is_trainable, **hub), True, commits
