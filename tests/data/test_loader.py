"""The loader of prompt batches: full batches only, of a torch dataset or one of the Hub's."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from trl.data.loader import is_hub_dataset, prompt_loader


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        return 10 * index


def test_batches_are_full_and_in_a_new_order_each_epoch() -> None:
    loader = prompt_loader(Numbers(), batch_size=2, collate_fn=list, keep=None)
    torch.manual_seed(0)
    epochs = [[number for batch in loader for number in batch] for _ in range(8)]
    assert all(len(epoch) == 4 and set(epoch) < {0, 10, 20, 30, 40} for epoch in epochs)  # 5 = 2 + 2 + a dropped 1
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_columns_of_a_hub_dataset_are_selected() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"query": ["a", "b"], "answer": [1, 2], "source": ["x", "y"]})
    assert is_hub_dataset(dataset) and not is_hub_dataset(Numbers())
    (batch,) = prompt_loader(dataset, batch_size=2, collate_fn=list, keep=["query", "answer"])
    assert sorted(batch, key=lambda row: row["query"]) == [{"query": "a", "answer": 1}, {"query": "b", "answer": 2}]
    (batch,) = prompt_loader(dataset, batch_size=2, collate_fn=list, keep=None)
    assert set(batch[0]) == {"query", "answer", "source"}


def test_datasets_is_not_imported_to_recognise_its_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    assert not is_hub_dataset(object())
    assert "datasets" not in sys.modules


@pytest.mark.parametrize("dataset", [[1, 2, 3], {"query": ["a"]}, None])
def test_other_sources_are_refused(dataset: Any) -> None:
    with pytest.raises(ValueError, match=f"not {type(dataset).__name__}"):
        prompt_loader(dataset, batch_size=1, collate_fn=None, keep=None)


def test_a_dataset_smaller_than_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset has 5 examples, fewer than batch_size=6"):
        prompt_loader(Numbers(), batch_size=6, collate_fn=None, keep=None)
