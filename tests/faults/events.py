"""What happens in a run, counted; and what is to happen to it at the n-th time.

An order is JSON: `{"kind": "scoring", "n": 3, "act": "SIGKILL"}` has the process killed when it comes to its third scoring.
Kinds are `sampling` and `evaluation` (each step of the decoding loop, and each sample that is scored for an evaluation),
`scoring` (each sample), `model` (before, in and after the writing of the final one), `before backward`, `after backward`, `before step`, `after step` (of the optimizer), and
`save/CALL`, `append/CALL` and `record/CALL` for each CALL on the disk: inside the folder of checkpoints, on the files that
grow by a line, and elsewhere. Acts are the names
of signals; for writes also `half`, which writes half of the bytes and is killed then; and for `after step`
`shake`, which leaves weights that are far from what was learnt.
`{"act": "full", "place": "save", "n": 3, "until": 5}` has writes 3, 4 and 5 there find no room.
`{"act": "loss", "value": "nan", "n": 5, "until": 6}` changes what the fifth and sixth loss of an update are: `nan`, or
`memory`, which is out unless the microbatch has one row alone.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

EVALUATION = 60  # the first token of every prompt that is for evaluation
_KIND_OF_FILE = {"metrics.jsonl": "append", "events.log": "append"}
CHANGES = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")


class Events:
    """Counts, and carries the orders out."""

    def __init__(self, orders: Sequence[dict[str, Any]]) -> None:
        self.counts: Counter[str] = Counter()
        self.orders = orders

    def __call__(self, kind: str) -> str | None:
        """Something of this kind is about to happen; an act that is the caller's to do is returned."""
        self.counts[kind] += 1
        for order in self.orders:
            if order.get("kind") == kind and order["n"] == self.counts[kind]:
                if order["act"] in ("half", "shake"):
                    return str(order["act"])
                os.kill(os.getpid(), signal.Signals[order["act"]])
        return None

    def asked(self, act: str, counter: str, **also: Any) -> dict[str, Any] | None:
        """The order, if any, for the event that `counter` now counts."""
        self.counts[counter] += 1
        for order in self.orders:
            same = order["act"] == act and all(order.get(key) == value for key, value in also.items())
            if same and order["n"] <= self.counts[counter] <= order.get("until", order["n"]):
                return order
        return None


class Disk:
    """Stands where `trl.files` sees `os`."""

    def __init__(self, events: Events, checkpoints: Path) -> None:
        self._events, self._checkpoints = events, checkpoints
        self._paths: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return self._open
        if name not in CHANGES:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            path = self._paths[args[0]] if isinstance(args[0], int) else Path(args[0])
            place = "save" if path.is_relative_to(self._checkpoints) else _KIND_OF_FILE.get(path.name, "record")
            if self._events(f"{place}/{name}") == "half":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "write" and self._events.asked("full", f"writes/{place}", place=place):
                real(args[0], bytes(args[1])[: len(args[1]) // 2])  # there was room for this much
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    def _open(self, path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = os.open(path, *args, **kwargs)
        self._paths[descriptor] = Path(path)
        return descriptor


def install(events: Events, run_dir: Path) -> None:
    """Has the events of this process's run counted, for the rest of its life."""
    _count_decoding(events)
    _count_updates(events)
    _count_model(events)
    _spoil_losses(events)
    patch("trl.files.os", Disk(events, run_dir / "checkpoints")).start()


def _count_decoding(events: Events) -> None:
    from trl.rewards import isolated as process
    from trl.rollout import decoders, local

    where = ["check"]  # the engine tries itself out once, before anything is sampled
    sample = local.sample

    def sampled(model: Any, queries: Any, **kwargs: Any) -> Any:
        where[0] = "evaluation" if int(queries[0][0]) == EVALUATION else "sampling"
        try:
            return sample(model, queries, **kwargs)
        finally:
            where[0] = "check"

    patch.object(local, "sample", sampled).start()
    for kind in (decoders.CausalDecoder, decoders.Seq2SeqDecoder):
        advance = kind.advance

        def advanced(self: Any, tokens: Any, advance: Callable[..., Any] = advance) -> Any:
            events(where[0])
            return advance(self, tokens)

        patch.object(kind, "advance", advanced).start()
    write = process._write

    def written(*args: Any) -> int:  # to the process of a reward, which is at work from then on
        size = write(*args)
        events("scoring")
        return size

    patch.object(process, "_write", written).start()


def _count_updates(events: Events) -> None:
    from trl.training.loop import Updater

    accumulate = Updater.accumulate

    def accumulated(self: Any, loss: Any) -> None:
        events("before backward")
        accumulate(self, loss)
        events("after backward")

    patch.object(Updater, "accumulate", accumulated).start()
    register_optimizer_step_pre_hook(lambda *_: events("before step") and None)
    register_optimizer_step_post_hook(lambda optimizer, *_: events("after step") == "shake" and _shake(optimizer))


@torch.no_grad()
def _shake(optimizer: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.add_(torch.randn(weight.shape, generator=noise))


def _count_model(events: Events) -> None:
    import safetensors.torch

    from trl.trainer.base import BaseTrainer

    save_pretrained, save_file = BaseTrainer.save_pretrained, safetensors.torch.save_file

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        events("model")
        save_pretrained(self, *args, **kwargs)
        events("model")

    def filed(*args: Any, **kwargs: Any) -> None:
        events("model")
        save_file(*args, **kwargs)

    patch.object(BaseTrainer, "save_pretrained", saved).start()
    patch.object(safetensors.torch, "save_file", filed).start()


def _spoil_losses(events: Events) -> None:
    from trl.algorithms.ppo import ppo_loss
    from trl.types import Loss

    def spoilt(policy: Any, settings: Any) -> Any:
        loss = ppo_loss(policy, settings)

        def of(experience: Any) -> Any:
            order = events.asked("loss", "losses")
            if order and order["value"] == "memory" and len(experience) > 1:
                raise torch.OutOfMemoryError("out of memory")
            found = loss(experience)
            if order and order["value"] == "nan":
                return Loss(objective=found.objective * torch.nan, metrics=found.metrics, arrays=found.arrays)
            return found

        return of

    patch("trl.algorithms.ppo.ppo_loss", spoilt).start()
