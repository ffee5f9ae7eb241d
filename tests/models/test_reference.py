"""Reference models: frozen copies, and copies that share their first layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.zoo import ZOO
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.models import create_reference_model

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GOLDEN = Path(__file__).parents[1] / "parity" / "data"


def trained(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def shared(model: torch.nn.Module, reference: torch.nn.Module) -> list[str]:
    theirs = {id(parameter) for parameter in reference.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in theirs]


def train_a_little(model: Any) -> None:
    """Moves every trained parameter."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    logits, _, values = model(TOKENS)
    (logits.logsumexp(-1).sum() + values.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("wrap", [Causal.from_pretrained, lambda trunk: trunk])
def test_copy_is_frozen_and_stays(wrap: Any) -> None:
    model = wrap(tiny_gpt2()).train()
    reference = create_reference_model(model)
    assert type(reference) is type(model)
    assert not reference.training
    assert model.training
    assert not trained(reference)
    assert trained(model) == [name for name, _ in model.named_parameters()]
    assert not shared(model, reference)


def test_copy_does_not_move_with_the_model() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    before = model(TOKENS)[0].detach()
    reference = create_reference_model(model)
    train_a_little(model)
    assert_close(reference(TOKENS)[0], before, 0)
    assert (model(TOKENS)[0] - before).abs().max() > 1e-3


def test_shared_layers_train_what_trl_0_4_6_trained() -> None:
    case = json.loads((GOLDEN / "gpt2_shared_layers" / "case.json").read_text())
    model = Causal.from_pretrained(tiny_gpt2())
    create_reference_model(model, num_shared_layers=case["num_shared_layers"])
    assert trained(model) == case["trainable"]


def test_shared_layers_are_the_same_tensors() -> None:
    model = Causal.from_pretrained(tiny_llama(num_hidden_layers=3))
    reference = create_reference_model(model, num_shared_layers=2)
    prefixes = tuple(f"pretrained_model.model.{part}" for part in ("embed_tokens.", "layers.0.", "layers.1."))
    assert shared(model, reference) == [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    assert not set(shared(model, reference)) & set(trained(model))
    assert "pretrained_model.lm_head.weight" in trained(model)
    assert not trained(reference)


def test_no_memory_is_spent_on_shared_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    original = torch.nn.Parameter.__deepcopy__

    def spy(self: torch.nn.Parameter, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", spy)
    model = Causal.from_pretrained(tiny_gpt2())
    create_reference_model(model, num_shared_layers=1)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert frozen
    assert not frozen & set(copied)


def test_shared_model_and_reference_agree_before_and_part_after() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    reference = create_reference_model(model, num_shared_layers=1)
    before = reference(TOKENS)[0]
    assert_close(model(TOKENS)[0], before, 0)
    train_a_little(model)
    assert_close(reference(TOKENS)[0], before, 0)
    assert (model(TOKENS)[0] - before).abs().max() > 1e-3


def test_encoder_is_before_the_first_decoder_layer() -> None:
    model = Seq2Seq.from_pretrained(tiny_t5())
    create_reference_model(model, num_shared_layers=1)
    names = trained(model)
    assert not [name for name in names if ".encoder." in name or ".shared." in name or ".block.0." in name]
    assert [name for name in names if ".decoder.block.1." in name]
    assert "pretrained_model.decoder.final_layer_norm.weight" in names


def test_own_pattern_and_all_layers() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    create_reference_model(model, num_shared_layers=2, pattern="transformer.h.{layer}")
    assert trained(model) == [
        "pretrained_model.transformer.ln_f.weight",
        "pretrained_model.transformer.ln_f.bias",
        "v_head.summary.weight",
        "v_head.summary.bias",
    ]


def test_no_layers_shares_the_embeddings() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    create_reference_model(model, num_shared_layers=0)
    frozen = [name for name, _ in model.named_parameters() if name not in trained(model)]
    assert frozen == ["pretrained_model.transformer.wte.weight", "pretrained_model.transformer.wpe.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shared_layers": 3}, r"num_shared_layers=3 is more than the 2 layers under 'transformer\.h\.\{layer\}'"),
        ({"num_shared_layers": -1}, "num_shared_layers=-1"),
        ({"num_shared_layers": 1.5}, r"num_shared_layers=1\.5"),
        ({"num_shared_layers": True}, "num_shared_layers=True"),
        ({"num_shared_layers": 1, "pattern": "blocks.{layer}"}, r"'blocks\.\{layer\}'.*transformer\.h\.\{layer\}"),
        ({"num_shared_layers": 1, "pattern": "transformer.h"}, r"known patterns: .*model\.layers\.\{layer\}"),
        ({"pattern": "transformer.h.{layer}"}, "without num_shared_layers"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_frozen(arguments: dict[str, Any], message: str) -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match=message):
        create_reference_model(model, **arguments)
    assert trained(model) == [name for name, _ in model.named_parameters()]


def test_an_adapter_is_copied_with_its_model() -> None:
    """As the notebooks of TRL 0.5 to 0.11 do: the copy answers as the model does now, and goes on doing so."""
    from tests.models.lora import lora, stir

    for model in (Causal.from_pretrained(lora(tiny_gpt2())), lora(tiny_gpt2())):
        stir(model)
        tokens = torch.tensor([[5, 6, 7]])
        before = model(input_ids=tokens)[0]
        reference = create_reference_model(model)
        assert type(reference) is type(model) and not reference.training
        assert not any(p.requires_grad for p in reference.parameters()) and any(
            p.requires_grad for p in model.parameters()
        )
        stir(model, seed=1)
        assert torch.equal(reference(input_ids=tokens)[0], before)
        assert not torch.equal(model(input_ids=tokens)[0], before)
        assert reference.generate(input_ids=tokens, max_new_tokens=2, do_sample=False).shape == (1, 5)
        with pytest.raises(ValueError, match="num_shared_layers=1 would freeze adapter weights"):
            create_reference_model(model, num_shared_layers=1)


@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_layers_of_every_architecture_are_found(architecture: Any) -> None:
    trunk = architecture.build()
    reference = create_reference_model(trunk, num_shared_layers=1)
    embeddings = trunk.get_input_embeddings().weight
    assert any(p is embeddings for p in reference.parameters())
    assert trained(trunk), "something must be left to train"
    layers = [name for name in shared(trunk, reference) if ".0." in name]
    assert layers, "the first layer must be shared"
