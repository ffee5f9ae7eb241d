"""What every test stands on: no network, one thread a process, the same seed."""

from __future__ import annotations

import os
import random
import sys

import pytest

# Before torch, transformers and tokenizers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "Agg"
if os.environ.get("TRL_TEST_GPU") != "1":  # tests are written for a CPU; bench/gpu/check.sh runs some of them on a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before, on whichever worker."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of the kernels themselves where `TRL_KERNELS=off` switches them off; all others must pass."""
    marked = [item for item in items if item.get_closest_marker("kernel")]
    if not marked:
        return
    from trl.kernels.door import kernels_enabled

    if not kernels_enabled():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="kernels are off"))
