"""Adam with bfloat16 moments: rounded at random, right on average, the same again after a resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from tests.helpers import tiny_gpt2
from tests.trainer.conftest import make_batch, make_trainer  # noqa: F401  (fixtures)
from trl import AutoModelForCausalLMWithValueHead
from trl.kernels.streaming_adam import NarrowAdam, _rounded_at_random
from trl.training.optimizers import make_adam


def test_rounding_is_right_on_average_and_goes_to_neighbours_alone() -> None:
    exact = torch.tensor([1.0 + 2**-10, 3.0, 0.0, 1e-30, 5e-41, 7.7e20])
    found = torch.stack([_rounded_at_random(exact.repeat(4096), seed).view(4096, 6) for seed in range(8)]).flatten(0, 1)
    assert torch.equal(found, found.bfloat16().float())
    below = exact.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    above = (below.view(torch.int32) + 2**16).view(torch.float32)
    assert ((found == below) | (found == above)).all()
    assert (found[:, 1:3] == exact[1:3]).all()  # bfloat16 has these
    share, gap = (found == above).double().mean(dim=0), (above - below).double()
    wanted = (exact.double() - below.double()) / gap
    assert (share - wanted).abs().max() < 4 * math.sqrt(0.25 / len(found))


def gradients(step: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.01 + 0.003 for shape in shapes]


SHAPES = [(64, 48), (48,), (3, 5, 7), (), (0,)]


def trained(kind: Any, steps: int) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = kind(parameters, lr=1e-3, fused=True)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step, SHAPES), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return parameters, optimizer


def test_it_goes_where_adam_goes() -> None:
    start, _ = trained(Adam, 0)
    narrow, optimizer = trained(NarrowAdam, 400)
    plain, reference = trained(Adam, 400)
    for begin, p, q in zip(start[:3], narrow, plain, strict=False):
        way = q - begin
        assert (p - q).norm() < 0.02 * way.norm()
        square, wanted = (o.state[x]["exp_avg_sq"] for o, x in ((optimizer, p), (reference, q)))
        assert square.dtype == torch.bfloat16 and wanted.dtype == torch.float32
        # Rounded to the nearest it would stop rising once a step adds less than half a spacing, at about a half of it.
        assert (square.float() / wanted).mean() == pytest.approx(1, abs=0.01)
        assert (square.float() / wanted - 1).abs().max() < 0.3


def test_a_copy_of_its_state_goes_on_in_the_same_way() -> None:
    parameters, optimizer = trained(NarrowAdam, 5)
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = NarrowAdam(others, lr=1e-3, fused=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, some in ((optimizer, parameters), (other, others)):
        for step in (5, 6):
            for parameter, gradient in zip(some, gradients(step, SHAPES), strict=True):
                parameter.grad = gradient
            o.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][name].dtype == torch.bfloat16
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step(make_trainer: Any, make_batch: Any, dtype: str) -> None:  # noqa: F811
    found = []
    for state in ("float32", "bfloat16"):
        trainer = make_trainer(dtype=dtype, optimizer_state_dtype=state, max_grad_norm=1.0)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for seed in range(3):
            stats = trainer.step(*make_batch(seed=seed))
        optimizer = trainer.optimizer.optimizer
        kinds = {t.dtype for s in optimizer.state.values() for name, t in s.items() if name != "step"}
        assert kinds == {getattr(torch, state)}
        found.append(torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), before, strict=True)]))
        assert math.isfinite(stats["ppo/loss/total"])
    assert torch.cosine_similarity(*found, dim=0) > 0.98


def test_a_checkpoint_of_the_other_kind_is_refused_by_the_settings_name(tmp_path: Path, make_trainer: Any) -> None:  # noqa: F811
    make_trainer().save_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"torch\.optim\.adam\.Adam, is a .*NarrowAdam \(see PPOConfig\.optimizer_state_dtype"
    ):
        make_trainer(optimizer_state_dtype="bfloat16").load_checkpoint(tmp_path)


def test_what_it_is_not_for(make_trainer: Any) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="optimizer_state_dtype='float16' must be one of float32, bfloat16"):
        make_trainer(optimizer_state_dtype="float16")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match="not to the given SGD"):
        make_trainer(model=model, optimizer=SGD(model.parameters(), lr=1e-3), optimizer_state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"needs float32 weights on a CPU or CUDA device, not torch\.bfloat16 on cpu"):
        make_adam([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-3, narrow=True)
