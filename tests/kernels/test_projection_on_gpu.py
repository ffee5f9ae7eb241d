"""Triton's projection, its running statistics and its gradient, against the same in plain torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.helpers import assert_close
from trl.kernels import projection, projection_on_gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")
def test_against_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert projection_on_gpu.usable(torch.device("cuda", 0))
    for entropy, temperature in product((False, True), (1.0, 0.7)):
        compare(entropy, temperature, torch.float32, 1e-4, monkeypatch)
        compare(entropy, temperature, torch.bfloat16, 0.02, monkeypatch)


def compare(
    entropy: bool, temperature: float, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in ((9, 16), (5000, 16), (5000,))
    )  # fmt: skip
    tokens = torch.randint(5000, (9,), generator=generator).cuda()
    results = []
    for fused in (False, True):
        monkeypatch.setattr(projection_on_gpu, "usable", lambda device, fused=fused: fused)
        logprobs, entropies = projection.projected_logprobs_and_entropy(
            hidden, weight, tokens, bias=bias, temperature=temperature, entropy=entropy, block=(4, 3000)
        )
        loss = (logprobs * torch.arange(9.0, device="cuda")).sum() + 0.3 * entropies.sum()
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        results.append((logprobs.detach(), entropies.detach(), *gradients))
    for plain, triton in zip(*results, strict=True):
        assert_close(plain.float(), triton.float(), tol=tolerance)


def test_plain_torch_where_there_is_no_gpu() -> None:
    assert not projection_on_gpu.usable(torch.device("cpu"))
