"""Loads through transformers' auto classes with safe defaults: no pickles, no checkpoint code, no long retries."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SAFE_FILE, PICKLE_FILE = "model.safetensors", "pytorch_model.bin"
ADAPTER_CONFIG, ADAPTER_SAFE_FILE, ADAPTER_PICKLE_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# Arguments that locate files, common to transformers and peft.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_REMEMBERED_SECONDS = 60.0  # until the hub is asked again whether it answers
_answers: dict[str, tuple[float, str | None]] = {}  # by endpoint: when it was asked, and why it cannot be reached


def hub_problem() -> str | None:
    """Why the model hub cannot be used: offline mode, or no answer to one request; None if it answers.

    Without this check, each of the dozen files that are looked up is requested six times with growing pauses, which
    takes minutes. The answer is remembered for a minute. `HF_HUB_ETAG_TIMEOUT` (10 seconds) limits the wait for it.
    """
    from huggingface_hub import constants

    asked, _ = _answers.get(constants.ENDPOINT, (-math.inf, None))
    if not constants.HF_HUB_OFFLINE and time.monotonic() - asked >= _REMEMBERED_SECONDS:
        _answers[constants.ENDPOINT] = time.monotonic(), _ask(constants.ENDPOINT, float(constants.HF_HUB_ETAG_TIMEOUT))
    return _known_problem()


def _known_problem() -> str | None:
    """`hub_problem` without a request."""
    from huggingface_hub import constants

    _, problem = _answers.get(constants.ENDPOINT, (0.0, None))
    return problem or ("HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else None)


def _ask(endpoint: str, seconds: float) -> str | None:
    """Sends one request to the hub; returns None for any answer, else the error."""
    from huggingface_hub.utils import get_session

    outcome: list[str | None] = []

    def request() -> None:
        try:
            get_session().request("HEAD", endpoint, timeout=seconds, follow_redirects=False)
        except Exception as error:  # of httpx or httpx2, whichever huggingface_hub uses
            outcome.append(f"{endpoint} cannot be reached: {error or type(error).__name__}")
        else:
            outcome.append(None)

    # On a thread of its own: no timeout limits how long a name server may take.
    thread = threading.Thread(target=request, name="hub", daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return outcome[0] if outcome else f"{endpoint} does not answer within {seconds:g} s"


@contextmanager
def cache_if_unreachable(source: str) -> Iterator[None]:
    """Turns huggingface_hub's offline mode on for a block that loads `source`, if that is a hub id out of reach.

    `local_files_only=True` would not do: transformers does not pass it on to every lookup.
    """
    from huggingface_hub import constants

    if not _is_hub_id(source) or constants.HF_HUB_OFFLINE or (problem := hub_problem()) is None:
        yield
        return
    logger.info("%s: reading %r from the cache", problem, source)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not Path(source).is_dir()


def _not_cached(source: str, kwargs: Mapping[str, Any]) -> OSError | None:
    """Error for a missing folder, or a hub id neither downloadable nor in the cache; None for other problems."""
    if _HUB_ID.fullmatch(source) is None and not Path(source).is_dir():
        return OSError(f"{source!r} is not a folder, nor the form of a hub id, name or user/name")
    if not _is_hub_id(source) or (problem := _known_problem()) is None:
        return None
    from huggingface_hub import constants

    return OSError(
        f"{source!r} is neither a local folder nor completely in the cache "
        f"{kwargs.get('cache_dir') or constants.HF_HUB_CACHE}, and it cannot be downloaded: {problem}. Pass a local "
        'folder, use a model of this package (trl.assets.path("tiny-gpt2-reviews"), '
        'trl.assets.path("tiny-bert-sentiment")), or load it once with a connection: '
        "then HF_HUB_OFFLINE=1 reads it from the cache"
    )


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `kwargs` that locate files (`HUB_ARGUMENTS`), without those that are None."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def find_file(source: str, name: str, hub: Mapping[str, Any], *, required: bool = False) -> str | None:
    """Returns the local path of the file `name` in a folder or hub id, downloading it if needed; None if missing.

    Where `required`, a file that is missing, or a hub that cannot be reached, is an OSError that says which.
    """
    from transformers.utils.hub import cached_file

    online = hub.get("local_files_only") is not True
    try:
        with cache_if_unreachable(source) if online else nullcontext():
            return cached_file(
                source,
                name,
                _raise_exceptions_for_gated_repo=required,
                _raise_exceptions_for_missing_entries=required,
                _raise_exceptions_for_connection_errors=required,
                **hub,
            )
    except OSError as error:
        if (not_cached := _not_cached(source, hub)) is not None:
            raise not_cached from error
        raise


def commit_of(source: str, name: str, hub: Mapping[str, Any]) -> str | None:
    """Returns the commit that a hub id's revision resolved to when its file `name` was read; None for a folder."""
    cached_hub = {key: value for key, value in hub.items() if key != "force_download"} | {"local_files_only": True}
    match = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", find_file(source, name, cached_hub) or "")
    return match[1] if match else None


def load_model(parent: Any, source: str, *args: Any, allow_pickle: bool = False, **kwargs: Any) -> Any:
    """Calls `parent.from_pretrained` on safetensors, without running the checkpoint's own code by default.

    Args:
        parent: a transformers auto class for models.
        source: folder or hub id.
        *args: passed to transformers.
        allow_pickle: read a legacy `.bin` if there are no safetensors, with `weights_only=True`.
        **kwargs: passed to transformers; `trust_remote_code` defaults to False.

    Raises:
        OSError: if there is no such folder or hub id, or the hub cannot be reached and the cache lacks the model.
        ValueError: if the weights are pickled and `allow_pickle` is False, or the model needs the checkpoint's own code
            and `trust_remote_code` is not True.
    """
    if kwargs.pop("weights_only", True) is not True:
        raise ValueError("weights_only=False would run code from a pickle; only weights_only=True is supported")
    if not allow_pickle:
        if kwargs.get("use_safetensors") is False:
            logger.info("use_safetensors=False: safetensors are read all the same where there are any, and no pickle")
        kwargs["use_safetensors"] = True
    kwargs["trust_remote_code"] = trusted(kwargs)
    if find_file(source, ADAPTER_CONFIG, hub_arguments(kwargs)) is not None:  # transformers loads adapters, too
        check_adapter_format(source, hub_arguments(kwargs), allow_pickle=allow_pickle)
    try:
        with cache_if_unreachable(source):
            return parent.from_pretrained(source, *args, **kwargs)
    except OSError as error:
        for name in (PICKLE_FILE, f"{PICKLE_FILE}.index.json"):
            if not allow_pickle and _exists(source, name, hub_arguments(kwargs)):
                raise ValueError(pickle_refused(source, name, SAFE_FILE)) from error
        if (not_cached := _not_cached(source, kwargs)) is not None:
            raise not_cached from error
        raise


def check_adapter_format(source: str, hub: Mapping[str, Any], *, allow_pickle: bool) -> None:
    """Checks that a PEFT adapter can be loaded without running its code.

    Raises:
        OSError: if the hub cannot be reached, or has no weights there.
        ValueError: if only pickled weights exist and `allow_pickle` is False, if the configuration names a module for
            peft to import (`megatron_config`), or if there are no weights.
    """
    config = find_file(source, ADAPTER_CONFIG, hub)
    if config is not None and json.loads(Path(config).read_text(encoding="utf-8")).get("megatron_config"):
        raise ValueError(
            f"the PEFT adapter {source!r} has a megatron_config, which makes peft import a module of its choice: "
            "remove it"
        )
    if find_file(source, ADAPTER_SAFE_FILE, hub) is not None:
        return
    if find_file(source, ADAPTER_PICKLE_FILE, hub) is None:
        if not Path(source).is_dir():
            find_file(source, ADAPTER_SAFE_FILE, hub, required=True)
        raise ValueError(f"the PEFT adapter {source!r} contains no {ADAPTER_SAFE_FILE}")
    if not allow_pickle:
        raise ValueError(pickle_refused(source, ADAPTER_PICKLE_FILE, ADAPTER_SAFE_FILE))


def load_tokenizer(source: str, **kwargs: Any) -> Any:
    """Loads the tokenizer of a folder or hub id; runs the checkpoint's own code only with `trust_remote_code=True`.

    Raises:
        OSError: as `load_model`.
    """
    from transformers import AutoTokenizer

    return _load_auto(AutoTokenizer, source, kwargs)


def load_config(source: str, **kwargs: Any) -> Any:
    """Loads the configuration of a folder or hub id, without weights; otherwise as `load_tokenizer`.

    Raises:
        OSError: as `load_model`.
    """
    from transformers import AutoConfig

    return _load_auto(AutoConfig, source, kwargs)


def _load_auto(auto_class: Any, source: str, kwargs: dict[str, Any]) -> Any:
    kwargs["trust_remote_code"] = trusted(kwargs)
    try:
        with cache_if_unreachable(source):
            return auto_class.from_pretrained(source, **kwargs)
    except OSError as error:
        if (not_cached := _not_cached(source, kwargs)) is not None:
            raise not_cached from error
        raise


def trusted(kwargs: Mapping[str, Any]) -> bool:
    """Returns the caller's `trust_remote_code`; None becomes False, because transformers would prompt on stdin."""
    return bool(kwargs.get("trust_remote_code"))


def pickle_refused(source: str, name: str, safe_name: str) -> str:
    """Returns the error message for `source` having the pickle `name` but not `safe_name`."""
    return (
        f"{source!r} contains {name}, a pickle, but no {safe_name}: pass allow_pickle=True to read it "
        "(with weights_only=True), or convert it to safetensors"
    )


def _exists(source: str, name: str, hub: Mapping[str, Any]) -> bool:
    try:
        return find_file(source, name, hub) is not None
    except OSError:
        return False
