"""Adam in pieces on bfloat16 gradients, against torch's own on the same gradients in float32."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from tests.helpers import assert_close, tiny_gpt2, tiny_llama
from tests.trainer.conftest import make_batch, make_trainer, weights_of  # noqa: F401  (fixtures)
from trl import AutoModelForCausalLMWithValueHead
from trl.kernels import streaming_adam as streaming
from trl.kernels.door import kernels_enabled
from trl.kernels.streaming_adam import adam_step, can_stream, total_norm
from trl.models.precision import NarrowCopies

SHAPES = [(), (1,), (7,), (33, 31), (5, 3, 2), (0,), (64, 40)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 0.01).bfloat16() for shape in SHAPES]


def equal(first: Any, second: Any) -> bool:
    """Whether two optimizers have the same state dict, to the bit."""
    one, other = first.state_dict(), second.state_dict()
    same = one["state"].keys() == other["state"].keys() and all(
        list(entries) == list(other["state"][i])
        and all(
            torch.equal(t, other["state"][i][k]) and t.dtype == other["state"][i][k].dtype for k, t in entries.items()
        )
        for i, entries in one["state"].items()
    )
    return same and one["param_groups"] == other["param_groups"]


# The step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("piece", [512, 2**18])
def test_it_is_fused_adam_to_the_bit(
    kind: type[Adam], weight_decay: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_CPU_CHUNK", piece)
    mine, theirs = parameters(), parameters()

    def optimizer(some: list[nn.Parameter]) -> Adam:
        groups: list[dict[str, Any]] = [{"params": some[:3], "lr": 0.03}, {"params": some[3:], "betas": (0.8, 0.9)}]
        return kind(groups, lr=0.01, weight_decay=weight_decay, fused=True)

    streamed, fused = optimizer(mine), optimizer(theirs)
    for step in range(4):
        narrow = dict(zip(mine, gradients(step), strict=True))
        if step == 1:
            del narrow[mine[3]]  # it counts its steps by itself
        for p, q, gradient in zip(mine, theirs, gradients(step), strict=True):
            q.grad = gradient.float() if p in narrow else None
        streamed.param_groups[0]["lr"] = fused.param_groups[0]["lr"] = 0.03 / (step + 1)
        stepped = adam_step(streamed, narrow)
        fused.step()
        assert {id(p) for p in stepped} == {id(p) for p in narrow}
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
        assert all(torch.equal(narrow[p], p.bfloat16()) for p in narrow)
        assert equal(streamed, fused)


def test_clipping_is_torchs() -> None:
    mine, theirs = parameters(), parameters()
    streamed, fused = Adam(mine, lr=0.01, fused=True), Adam(theirs, lr=0.01, fused=True)
    for step in range(3):
        narrow = dict(zip(mine, gradients(step), strict=True))
        for q, gradient in zip(theirs, gradients(step), strict=True):
            q.grad = gradient.float()
        norm = total_norm(narrow.values(), [])
        expected = nn.utils.clip_grad_norm_(theirs, 0.1)
        assert expected > 0.1
        assert_close(norm, expected, 1e-6)
        adam_step(streamed, narrow, float(0.1 / (norm + 1e-6)))
        fused.step()
        for p, q in zip(mine, theirs, strict=True):
            assert_close(p, q, 1e-6)


def test_a_norm_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_CPU_CHUNK", 4)
    assert_close(total_norm([torch.full((9,), 2.0).bfloat16()], [torch.tensor([8.0])]), 10.0, 1e-6)
    assert total_norm([], []) == 0
    assert not total_norm([torch.tensor([1.0, float("nan")]).bfloat16()], []).isfinite()


def test_parameters_whose_numbers_do_not_lie_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    start, slope = (torch.randn(6, 5, generator=generator) for _ in range(2))
    mine, theirs = nn.Parameter(start.clone().t()), nn.Parameter(start.clone().t())
    narrow = {mine: slope.bfloat16().t()}
    theirs.grad = slope.bfloat16().float().t()
    adam_step(Adam([mine], lr=0.1), narrow)
    Adam([theirs], lr=0.1, fused=True).step()
    assert torch.equal(mine, theirs) and torch.equal(narrow[mine], theirs.bfloat16())


class _Own(Adam):
    pass


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("make", "able"),
    [
        (lambda p: Adam(p), True),
        (lambda p: AdamW(p, fused=True), True),
        (lambda p: Adam([{"params": p[:1]}, {"params": p[1:], "fused": False}]), False),
        (lambda p: Adam(p, foreach=True), False),
        (lambda p: Adam(p, amsgrad=True), False),
        (lambda p: Adam(p, maximize=True), False),
        (lambda p: Adam(p, capturable=True), False),
        (lambda p: Adam(p, differentiable=True), False),
        (lambda p: _Own(p), False),
        (lambda p: SGD(p, lr=0.1), False),
    ],
)
def test_which_optimizers(make: Callable[[list[nn.Parameter]], Any], able: bool) -> None:
    assert can_stream(make(parameters())) is able


# The gradients ---------------------------------------------------------------------------------------------------------


def policy(build: Callable[..., Any] = tiny_gpt2) -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(build(), summary_dropout_prob=0.0)


def loss(model: Any) -> Tensor:
    logits, _, values = model(torch.arange(3, 23).reshape(2, 10))
    return logits.log_softmax(-1)[..., 5].mean() + values.mean()


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_the_copies_place_are_those_that_are_widened(
    build: Callable[..., Any], checkpointing: bool
) -> None:
    model = policy(build).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    copies = NarrowCopies(model)
    with copies.stand_in():
        loss(model).backward()
    expected = {p: p.grad.clone() for p in model.parameters()}
    model.zero_grad()
    with copies.stand_in(gradients_in_place=True):
        loss(model).backward()
    held = copies.gradients()
    assert len(held) == len(expected) - 2
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        found = p.grad if "v_head" in name else held[p]
        assert torch.equal(found.float(), expected[p]), name
        assert p.grad is None or "v_head" in name
    with copies.stand_in():  # the copies are back
        assert all(torch.equal(p, copy.float()) for p, copy in zip(model.parameters(), copies._copies, strict=False))
        loss(model).backward()
    assert all(torch.equal(p.grad, expected[p]) for p in held)


def test_a_pass_that_fails_costs_no_weight() -> None:
    model = policy()
    copies = NarrowCopies(model)
    copies.refresh()
    before = [p.detach().bfloat16() for p in copies._parameters]
    first = next(iter(copies._parameters))  # its gradient comes last

    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError

    handle = first.register_hook(fail)
    with pytest.raises(ZeroDivisionError), copies.stand_in(gradients_in_place=True):
        loss(model).backward()
    handle.remove()
    assert copies.gradients()
    with copies.stand_in():
        assert all(torch.equal(a, b) for a, b in zip(before, copies._parameters, strict=True))
    assert not copies.gradients()


def test_gradients_that_are_there_are_added_to() -> None:
    model = policy()
    copies = NarrowCopies(model)
    p = copies._parameters[0]
    p.grad = torch.ones_like(p)
    with copies.stand_in(gradients_in_place=True):
        loss(model).backward()
    assert p not in copies.gradients() and p.grad is not None and not torch.equal(p.grad, torch.ones_like(p))


def test_two_gradients_of_one_weight_in_one_pass_are_an_error() -> None:
    """Re-entrant checkpointing of a layer that is used twice: its second pass would compute with a gradient."""
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(4, 4)
    copies = NarrowCopies(layer)
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="got two gradients"), copies.stand_in(gradients_in_place=True):
        checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()


# A whole step ----------------------------------------------------------------------------------------------------------


def trained(make_trainer: Any, make_batch: Any, steps: int = 2, seq2seq: bool = False, **arguments: Any) -> Any:  # noqa: F811
    trainer = make_trainer(seq2seq=seq2seq, dtype="bfloat16", **arguments)
    stats = [trainer.step(*make_batch(seq2seq=seq2seq, seed=i)) for i in range(steps)]
    return trainer, stats


@pytest.mark.kernel
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_step_gives_what_it_gives_with_float32_gradients(
    seq2seq: bool,
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (mine, stats) = trained(make_trainer, make_batch, seq2seq=seq2seq)
    assert all(p.grad is None or "v_head" in n or ".wo." in n for n, p in mine.model.named_parameters())
    monkeypatch.setattr("trl.training.loop.can_stream", lambda optimizer: False)
    (theirs, expected) = trained(make_trainer, make_batch, seq2seq=seq2seq)
    assert all(p.grad is not None for p in theirs.model.parameters())
    for p, q in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert equal(mine.optimizer, theirs.optimizer)
    for one, other in zip(stats, expected, strict=True):
        assert one["ppo/loss/total"] == other["ppo/loss/total"]
        assert_close(one["ppo/grad_norm"], other["ppo/grad_norm"], 1e-5)


@pytest.mark.kernel
def test_a_clipped_step(make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    settings = {"max_grad_norm": 0.01, "optimizer": None, "steps": 1, "ppo_epochs": 1, "mini_batch_size": 4}
    (mine, stats) = trained(make_trainer, make_batch, **settings)
    monkeypatch.setattr("trl.training.loop.can_stream", lambda optimizer: False)
    (theirs, expected) = trained(make_trainer, make_batch, **settings)
    assert stats[0]["ppo/grad_norm"] > 0.01
    assert_close(stats[0]["ppo/grad_norm"], expected[0]["ppo/grad_norm"])
    for (name, p), q in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert_close(mine.optimizer.state[p]["exp_avg"], theirs.optimizer.state[q]["exp_avg"], 1e-7)
        assert "v_head" in name or p.grad is None


def test_several_microbatches_are_added_up_in_float32(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer, _ = trained(make_trainer, make_batch, mini_batch_size=1, gradient_accumulation_steps=2)
    assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_out_of_memory_in_the_backward_pass(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    """The first attempt dies when half of the copies are gradients; the update is then what it is in halves."""
    trainers = [
        make_trainer(dtype="bfloat16", mini_batch_size=size, gradient_accumulation_steps=4 // size) for size in (4, 2)
    ]
    for trainer in trainers:
        trainer.config.ppo_epochs = 1
    first = trainers[0].model.pretrained_model.transformer.wte.weight
    failed = []

    def once(gradient: Tensor) -> None:
        if not failed:
            failed.append(len(trainers[0].compute.gradients()))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    first.register_hook(once)
    for trainer in trainers:
        trainer.step(*make_batch())
    assert failed and (failed[0] > 5) == kernels_enabled() and trainers[0].guards.largest_microbatch == 2
    assert all(torch.equal(w, weights_of(trainers[1])[n]) for n, w in weights_of(trainers[0]).items())


def test_a_gradient_that_is_not_finite_changes_nothing(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer, _ = trained(make_trainer, make_batch, steps=1)
    before, state = weights_of(trainer), copy.deepcopy(trainer.optimizer.state_dict())
    bias = trainer.model.pretrained_model.transformer.h[0].mlp.c_fc.bias
    handle = bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.warns(UserWarning, match="this optimizer step is skipped"):
        trainer.step(*make_batch())
    handle.remove()
    assert all(torch.equal(w, before[n]) for n, w in weights_of(trainer).items())
    after = trainer.optimizer.state_dict()
    for i, entries in state["state"].items():
        assert all(torch.equal(t, after["state"][i][k]) for k, t in entries.items())
    assert not trainer.compute.gradients()
    copies = trainer.compute._copies
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies._copies, copies._parameters, strict=True))


def test_warming_up_the_value_head_leaves_the_rest(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer = make_trainer(dtype="bfloat16", value_warmup_steps=1)
    before = weights_of(trainer)
    trainer.step(*make_batch())
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {"v_head.summary.weight", "v_head.summary.bias"}
    assert len(trainer.optimizer.state) == 2
    trainer.step(*make_batch())
    assert len(trainer.optimizer.state) == len(before)


def test_parameters_that_the_optimizer_does_not_have(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    model = policy()
    some = [*model.pretrained_model.transformer.h[1].parameters(), *model.v_head.parameters()]
    trainer = make_trainer(dtype="bfloat16", model=model, optimizer=Adam(some, lr=1e-2))
    before = weights_of(trainer)
    trainer.step(*make_batch())
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    assert moved and all(".h.1." in name or "v_head" in name for name in moved)
    copies = trainer.compute._copies
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies._copies, copies._parameters, strict=True))


def test_hooks_and_schedulers_see_a_step(make_batch: Any) -> None:  # noqa: F811
    """A hook's change of the weights is seen by the next pass; nothing warns of a scheduler that came first."""
    from tests.helpers import tiny_tokenizer
    from trl import PPOConfig, PPOTrainer

    model = policy()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen: list[str] = []
    weight = model.pretrained_model.transformer.h[0].mlp.c_fc.weight

    def clamp(*_: Any) -> None:
        seen.append("after")
        with torch.no_grad():
            weight.clamp_(-0.01, 0.01)

    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(clamp)
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler)
        trainer.step(*make_batch())
    assert seen == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 5e-4
    copies = trainer.compute._copies
    assert copies is not None
    assert torch.equal(copies._copies[copies._indices[weight]], weight.bfloat16())


@pytest.mark.kernel
def test_what_was_narrowed_in_the_step_is_not_narrowed_again(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer, _ = trained(make_trainer, make_batch, steps=1)
    copies, narrowed = trainer.compute._copies, []
    plain = copies._narrow
    copies._narrow = lambda places: (narrowed.append(len(list(places))), plain(places))  # type: ignore[method-assign]
    trainer.step(*make_batch())
    assert [n for n in narrowed if n] == [len(copies._parameters)]  # before the first pass


def test_other_optimizers_may_write_as_they_like(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    """Old optimizers write through `.data`, of which torch counts nothing."""

    class Old(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad.data, alpha=-group["lr"])

    model = policy()
    trainer = make_trainer(dtype="bfloat16", model=model, optimizer=Old(model.parameters(), lr=0.1))
    trainer.step(*make_batch())
    copies = trainer.compute._copies
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies._copies, copies._parameters, strict=True))


# The base of an adapter -------------------------------------------------------------------------------------------------


def adapted(**settings: Any) -> Any:
    from tests.models.lora import lora

    return AutoModelForCausalLMWithValueHead.from_pretrained(lora(tiny_gpt2(), **settings), summary_dropout_prob=0.0)


def test_the_base_of_an_adapter_is_held_narrow(
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="trl.training.compute"):
        trainer = make_trainer(dtype="bfloat16", model=adapted(), learning_rate=1e-2)
    assert "frozen weights under the adapter in bfloat16" in caplog.text
    kinds = {("lora_" in n or "v_head" in n): p.dtype for n, p in trainer.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    before = weights_of(trainer)
    first = trainer.step(*make_batch())
    assert first["objective/kl"] == 0
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name]) != ("lora_" in name or "v_head" in name)
    assert abs(trainer.step(*make_batch())["objective/kl"]) > 0
    with torch.no_grad():  # outside of a pass
        logits, _, values = trainer.model(torch.arange(3, 13)[None])
    assert logits.dtype == values.dtype == torch.float32


def test_a_frozen_base_computes_as_its_copies_did(
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = make_trainer(dtype="bfloat16", model=adapted(), learning_rate=1e-2)
    monkeypatch.setattr("trl.training.compute.narrow_base", lambda model: [])
    theirs = make_trainer(dtype="bfloat16", model=adapted(), learning_rate=1e-2)
    assert {p.dtype for p in theirs.model.parameters()} == {torch.float32}
    for seed in range(2):
        one, other = (trainer.step(*make_batch(seed=seed)) for trainer in (mine, theirs))
        assert one["objective/kl"] == other["objective/kl"] and one["ppo/loss/total"] == other["ppo/loss/total"]
    for (name, p), q in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q) if p.dtype == torch.float32 else torch.equal(p, q.bfloat16()), name


def test_training_what_was_frozen_is_an_error(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer = make_trainer(dtype="bfloat16", model=adapted())
    trainer.model.pretrained_model.base_model.model.transformer.wte.weight.requires_grad_(True)
    told = pytest.warns(UserWarning, match="its optimizer does not hold them")
    with told, pytest.raises(RuntimeError, match="were frozen when the trainer was built"):
        trainer.step(*make_batch())


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["ln_f"]}], ids=lambda s: next(iter(s))
)
def test_where_a_direct_call_would_mix_dtypes_the_base_stays_float32(settings: Any, make_trainer: Any) -> None:  # noqa: F811
    trainer = make_trainer(dtype="bfloat16", model=adapted(**settings))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_layers_that_are_frozen_in_a_whole_model_stay_float32(make_trainer: Any) -> None:  # noqa: F811
    model = policy()
    model.pretrained_model.transformer.h[0].requires_grad_(False)
    trainer = make_trainer(dtype="bfloat16", model=model)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


# Memory ------------------------------------------------------------------------------------------------------------------


def test_the_peak_of_memory_is_among_the_statistics(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer = make_trainer()
    before = trainer.step(*make_batch())["memory/peak_mb"]
    held = torch.ones(256 * 2**20, dtype=torch.uint8)
    after = trainer.step(*make_batch())["memory/peak_mb"]
    assert before > 50 and len(held) / 2**20 <= after < 2**20  # MiB: neither KiB nor bytes
    assert after >= before


# Many parameters at once, as on a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("group_size", [1, 40, 2**26])
def test_parameters_together_are_parameters_one_by_one(
    kind: type[Adam], group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_GPU_GROUP", group_size)
    one, together = parameters(), parameters()
    first, second = (kind(p, lr=0.01, weight_decay=0.1, fused=True) for p in (one, together))
    for step in range(3):
        mine, theirs = gradients(step), gradients(step)
        adam_step(first, dict(zip(one, mine, strict=True)), 0.5)
        group = second.param_groups[0]
        updates = [(p, g, streaming._state(second, p, group)) for p, g in zip(together, theirs, strict=True)]
        batches = list(streaming._batches(updates))
        assert sum(len(batch) for batch in batches) == len(SHAPES)
        for batch in batches:
            streaming._step_together(batch, group, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, together, strict=True))
    assert equal(first, second)
