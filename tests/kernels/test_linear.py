"""Models whose linear layers multiply in the quickest way while a pass is made."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trl.kernels import products
from trl.kernels.linear import fast_linear_layers
from trl.kernels.products import LinearForward
from trl.models.predictions import abilities
from trl.models.trunk import without_head

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not products._has_onednn(), reason="torch was built without oneDNN's linear layers"),
]


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_WORTHWHILE", 0)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=80, **sizes)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_same_logits_and_gradients_and_nothing_left_behind(make) -> None:
    model = make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    words = torch.randint(80, (3, 9))

    def numbers(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=words).logits
        logits.float().logsumexp(-1).sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    want = numbers(copy.deepcopy(model).double())
    with fast_linear_layers(model):
        found = [m for m in model.modules() if isinstance(vars(m).get("forward"), LinearForward)]
        assert len(found) == (15 if make is llama else 9)
        got = numbers(model)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: values.keys() for name, values in before.items()
    }


def test_within_each_other_and_with_shared_layers() -> None:
    model, other = llama(), llama()
    other.model.layers[0] = model.model.layers[0]
    with fast_linear_layers(model, other):
        with fast_linear_layers(model):
            pass
        assert isinstance(vars(model.lm_head)["forward"], LinearForward)
        with without_head(model):
            assert model(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits.shape == (1, 2, 0)
        assert isinstance(vars(model.lm_head)["forward"], LinearForward)
    assert not any("forward" in vars(m) for model in (model, other) for m in model.modules())


def test_a_layer_that_somebody_replaced_is_left_alone() -> None:
    model = llama()
    theirs = model.lm_head.forward = lambda hidden: hidden[..., :5]
    with fast_linear_layers(model):
        assert model.lm_head.forward is theirs
    assert model.lm_head.forward is theirs


def test_after_an_error_nothing_is_left_behind() -> None:
    model = llama()
    with pytest.raises(ZeroDivisionError), fast_linear_layers(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_model_that_multiplies_so_still_projects() -> None:
    model = llama()
    with fast_linear_layers(model):
        assert abilities(model).projects


def test_where_torch_is_quick_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: False)
    model = llama()
    with fast_linear_layers(model):
        assert not any("forward" in vars(m) for m in model.modules())


def test_the_argument_may_be_named() -> None:
    layer, rows = llama().lm_head, torch.randn(3, 64)
    want = layer(rows)
    with fast_linear_layers(layer):
        torch.testing.assert_close(layer(input=rows), want)
        torch.testing.assert_close(layer(rows), want)
