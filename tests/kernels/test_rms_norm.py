"""RMSNorm as one operation: the same numbers as a model's own, and only where that is what its module computes."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.helpers import assert_close, tiny_llama
from trl.kernels.rms_norm import fused_norms, is_plain_rms_norm


def test_a_norm_with_more_to_it_is_left_alone() -> None:
    assert is_plain_rms_norm(LlamaRMSNorm(8, eps=1e-5))
    assert not is_plain_rms_norm(GemmaRMSNorm(8))  # multiplies by 1 + weight
    assert not is_plain_rms_norm(torch.nn.LayerNorm(8))
    hooked = LlamaRMSNorm(8)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    assert not is_plain_rms_norm(hooked)


@pytest.mark.kernel
def test_logits_and_gradients_are_the_models_own() -> None:
    model = tiny_llama()
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 2.0)
    tokens = torch.arange(3, 23).view(2, 10)
    found = []
    for fused in (False, True):
        with fused_norms(*([model] if fused else [])):
            assert all(("forward" in vars(norm)) == fused for norm in norms)
            logits = model(input_ids=tokens).logits
            found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    assert all("forward" not in vars(norm) for norm in norms)
    for own, other in zip(*found, strict=True):
        assert_close(own, other, tol=1e-4)


@pytest.mark.kernel
def test_another_dtype_than_the_weights_is_computed_as_before() -> None:
    norm = LlamaRMSNorm(8)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = norm(x)
    with fused_norms(norm):
        assert torch.equal(norm(x), before)
