"""`-p pytest_plugin`: tests make their tensors on the GPU unless they say otherwise (GPU_CHECK_DEFAULT_DEVICE=1)."""

import os

import pytest


@pytest.fixture(autouse=True)
def _default_device():
    import torch

    if os.environ.get("GPU_CHECK_DEFAULT_DEVICE") and torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
    else:
        yield
