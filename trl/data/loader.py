"""DataLoader for datasets of prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset


def is_hub_dataset(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.Dataset`, without importing datasets."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def is_hub_stream(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.IterableDataset`, without importing datasets."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def prompt_loader(
    dataset: Any, *, batch_size: int, collate_fn: Callable[..., Any] | None, keep: Sequence[str] | None
) -> DataLoader[Any]:
    """DataLoader with shuffled batches, dropping an incomplete last batch, since `step` takes only full ones.

    Args:
        dataset: a torch dataset or a `datasets.Dataset`.
        batch_size: examples per batch.
        collate_fn: turns a list of examples into a batch.
        keep: columns of a `datasets.Dataset` to keep; None keeps all.

    Raises:
        ValueError: if `dataset` is neither of the two, or is smaller than one batch.
    """
    if not isinstance(dataset, Dataset) and not is_hub_dataset(dataset):
        raise ValueError(f"dataset must be a torch Dataset or a datasets.Dataset, not {type(dataset).__name__}")
    if is_hub_dataset(dataset) and keep is not None:
        dataset = dataset.remove_columns([c for c in dataset.column_names if c not in keep])
    if hasattr(dataset, "__len__") and len(dataset) < batch_size:
        raise ValueError(f"dataset has {len(dataset)} examples, fewer than batch_size={batch_size}")
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn, shuffle=True, drop_last=True)
