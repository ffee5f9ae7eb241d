"""In-memory checkpoints: rollback targets for runs without a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

from torch import Tensor

from trl.state.checkpoints import versions
from trl.state.tensorfile import kind_of
from trl.training.resume import capture
from trl.training.run_state import RunState


@dataclass(frozen=True, slots=True)
class _Slice:
    """Dtype and shape of a tensor, in the form of a safetensors slice."""

    tensor: Tensor

    def get_dtype(self) -> str:
        return kind_of(self.tensor)[0]

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


@dataclass(frozen=True, slots=True)
class _File:
    """Named tensors, in the form of an open safetensors file."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCheckpoint:
    """In-memory stand-in for a `Checkpoint`, accepted by `restore`."""

    path: Path
    versions: Mapping[str, str]
    state: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, trainer: RunState) -> MemoryCheckpoint:
        """Copies a trainer's state to CPU memory. Every process must call this."""
        tensors, state = capture(trainer)
        copies = {
            file: {name: t.detach().to("cpu", copy=True) for name, t in group.items()}
            for file, group in tensors.items()
        }
        return cls(path=Path("memory"), versions=versions(), state=loads(dumps(state)), groups=copies)

    @contextmanager
    def open(self, name: str) -> Iterator[_File]:
        """Like `Checkpoint.open`, but yields copies, since an optimizer adopts the tensors it is given."""
        yield _File({key: tensor.clone() for key, tensor in self.groups[name].items()})
