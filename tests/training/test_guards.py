"""Updates that meet numbers that are none, and memory that is used up."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tests.functional.oracles import Ranks
from tests.helpers import assert_close, tiny_gpt2, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.training.guards import NonFiniteError, SkippedUpdate, UpdateGuards
from trl.training.loop import Minibatch, Updater, optimize
from trl.types import ActorCritic, Loss, Rollout, Tally, identity


class Processes:
    """What the loop asks of accelerate; backward passes as in a thread that is one of `num_processes`."""

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes, self.scaler = num_processes, None

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self) -> None:
        pass


def minibatch(rows: int = 8) -> Minibatch:
    """Scores 1, 2, 3 ... to fit, one response token each."""
    tokens = torch.full((rows, 2), 5)
    ones = torch.ones(rows, 1)
    experience = ActorCritic(
        rollout=Rollout(tokens=tokens, attention=torch.ones(rows, 2).bool(), mask=ones.bool()),
        scores=torch.arange(1.0, rows + 1),
        old_logprobs=ones, ref_logprobs=ones, old_values=ones, rewards=ones, advantages=ones, returns=ones,
        non_score_reward=ones,
    )  # fmt: skip
    return Minibatch(experience=experience, denominator=torch.tensor(float(rows)))


class Weight(nn.Module):
    """w, from 0; the loss of a row is (w - score)²."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def loss(self, experience: ActorCritic) -> Loss:
        errors = (self.w - experience.scores[:, None]) ** 2
        mask = experience.rollout.mask
        return Loss(
            objective=errors.sum(), metrics={"loss/total": Tally.of(errors, mask)}, arrays={"x": errors.detach()}
        )


def run(
    loss_of: Callable[[Weight], Callable[[ActorCritic], Loss]],
    minibatches: int = 1,
    size: int = 8,
    processes: int = 1,
    reduce: Any = identity,
    guards: UpdateGuards | None = None,
    rows: int = 8,
) -> tuple[float, list[Any], UpdateGuards]:
    """w after some optimizer steps at a rate of 0.1, their metrics, and what the guards remember."""
    model, guards = Weight(), guards or UpdateGuards()
    updater = Updater(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), accelerator=Processes(processes),
        guards=guards, reduce=reduce,
    )  # fmt: skip
    batches = [minibatch(rows)] * minibatches
    history = optimize(batches, loss_of(model), updater, microbatch_size=size, reduce=reduce)
    return float(model.w.detach()), history, guards


# R10: not finite -----------------------------------------------------------------------------------------------------


def spoiled(when: Callable[[int], bool], by: Callable[[Tensor], Tensor]) -> Any:
    """The loss, spoiled in the calls of which `when` says so."""
    calls = iter(range(1000))

    def of(model: Weight) -> Any:
        def loss(experience: ActorCritic) -> Loss:
            plain = model.loss(experience)
            if not when(next(calls)):
                return plain
            return Loss(objective=by(plain.objective), metrics=plain.metrics, arrays=plain.arrays)

        return loss

    return of


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (lambda x: x * math.nan, "gradient norm is nan"),
        (lambda x: x * math.inf, "gradient norm is -?inf"),
        (lambda x: x + math.inf, "the loss is not finite"),  # its gradient is finite, and means nothing
    ],
)
def test_r10_a_step_that_is_not_finite_is_not_taken(by: Any, reason: str) -> None:
    """One microbatch of two is enough. w: 0.1 · 2 · mean(1..8) = 0.9 after one good step."""
    with pytest.warns(UserWarning, match=f"{reason}: this optimizer step is skipped"):
        w, history, guards = run(spoiled(lambda call: call == 0, by), minibatches=2, size=4)
    assert [metrics.stepped for metrics in history] == [False, True]
    assert_close(w, 0.9)
    assert guards.consecutive_skips == 0


def test_r10_no_rank_steps_if_one_must_not() -> None:
    def rank(i: int, reduce: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(
                spoiled(lambda call: i == 1 and call == 0, lambda x: x * math.nan),
                minibatches=2, processes=2, reduce=reduce,
            )  # fmt: skip

    (w0, first, guards0), (w1, second, guards1) = Ranks(2).run(rank)
    assert [m.stepped for m in first] == [m.stepped for m in second] == [False, True]
    assert math.isfinite(first[0].grad_norm) and math.isnan(second[0].grad_norm)
    assert w0 == w1 and w0 > 0


def test_r10_the_run_ends_after_too_many_in_a_row_and_the_batch_can_be_looked_at() -> None:
    seen: list[SkippedUpdate] = []
    guards = UpdateGuards(max_skipped=3, on_skip=seen.append)
    bad = {0, 1, 3, 4, 5}
    with pytest.warns(UserWarning, match="is skipped"):
        with pytest.raises(
            NonFiniteError, match=r"3 optimizer steps in a row .*max_skipped_updates=3.*gradient norm is nan"
        ):
            run(spoiled(lambda call: call in bad, lambda x: x * math.nan), minibatches=9, guards=guards)
    assert [skip.in_a_row for skip in seen] == [1, 2, 1, 2, 3]
    assert seen[0].experience is not None and seen[0].experience.scores.tolist() == list(range(1, 9))
    assert math.isnan(seen[0].grad_norm)


def trainer(**settings: Any) -> PPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    return PPOTrainer(
        PPOConfig(**({"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1, "learning_rate": 1e-3} | settings)),
        model, None, tiny_tokenizer(),
    )  # fmt: skip


def batch(seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(3, 61, (n,), generator=random)  # noqa: E731
    return (
        [words(2 + i % 3) for i in range(8)],
        [words(3 + i % 4) for i in range(8)],
        list(torch.randn(8, generator=random)),
    )


def test_r10_through_the_trainer_over_calls_of_step() -> None:
    subject = trainer(max_skipped_updates=3, ppo_epochs=2)
    next(iter(subject.model.parameters())).register_hook(lambda grad: grad * math.nan)
    before = copy.deepcopy(subject.model.state_dict())
    with pytest.warns(UserWarning, match="is skipped"):
        stats = subject.step(*batch())
    assert stats["ppo/skipped_updates"] == 1.0
    assert subject.guards.consecutive_skips == subject.state_dict()["consecutive_skips"] == 2
    with pytest.raises(NonFiniteError), pytest.warns(UserWarning, match="is skipped"):
        subject.step(*batch())
    assert all(torch.equal(before[k], v) for k, v in subject.model.state_dict().items())


class Scaled(Processes):
    """accelerate in fp16, with its loss scaler; gradients overflow as often as `overflows` says."""

    def __init__(self, model: Weight, overflows: int, scale: float = 2.0**16, processes: int = 1) -> None:
        super().__init__(processes)
        Accelerator()  # whose state the optimizer below asks for
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=self.scaler)
        left = iter([math.inf] * overflows)
        model.w.register_hook(lambda gradient: gradient * next(left, 1.0))

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale_gradients(self) -> None:
        self.scaler.unscale_(self.optimizer.optimizer)


def scaled(
    overflows: int,
    minibatches: int,
    guards: UpdateGuards,
    scale: float = 2.0**16,
    processes: int = 1,
    reduce: Any = identity,
    spoil: float = 0.0,
) -> tuple[float, float, list[bool]]:
    """w and the loss scale after some optimizer steps in fp16, and which of them were taken."""
    model = Weight()
    accelerator = Scaled(model, overflows, scale, processes)
    updater = Updater(
        model=model, optimizer=accelerator.optimizer, accelerator=accelerator, guards=guards, reduce=reduce
    )

    def loss(experience: ActorCritic) -> Loss:
        plain = model.loss(experience)
        return Loss(objective=plain.objective + spoil, metrics=plain.metrics, arrays=plain.arrays)

    history = optimize([minibatch()] * minibatches, loss, updater, microbatch_size=8, reduce=reduce)
    return float(model.w.detach()), accelerator.scaler.get_scale(), [metrics.stepped for metrics in history]


def test_fp16_overflows_lower_the_loss_scale_and_the_run_goes_on() -> None:
    """They are how a scaler finds its scale: no reason to end a run."""
    guards = UpdateGuards(max_skipped=1)
    with pytest.warns(UserWarning, match="at a loss scale of [0-9]+, which is lowered"):
        w, scale, taken = scaled(3, 4, guards)
    assert taken == [False, False, False, True]
    assert scale == 2.0**13
    assert math.isclose(w, 0.1 * 2 * 4.5, rel_tol=1e-6)  # one step, on the unscaled gradient of mean((w - score)²)


@pytest.mark.parametrize(("scale", "spoil"), [(1.0, 0.0), (2.0**16, math.inf)])
def test_fp16_skips_that_no_scale_helps_end_the_run(scale: float, spoil: float) -> None:
    guards = UpdateGuards(max_skipped=2)
    with pytest.raises(NonFiniteError), pytest.warns(UserWarning, match="is skipped"):
        scaled(99, 9, guards, scale=scale, spoil=spoil)
    assert guards.consecutive_skips == 2


def test_fp16_processes_keep_one_loss_scale() -> None:
    """Where the gradient of one alone overflows, gradients that meet in a sum must have been scaled alike."""
    with pytest.warns(UserWarning, match="is skipped"):
        outcomes = Ranks(2).run(lambda rank, reduce: scaled(rank, 2, UpdateGuards(), processes=2, reduce=reduce))
    assert [taken for _, _, taken in outcomes] == [[False, True]] * 2
    assert [scale for _, scale, _ in outcomes] == [2.0**15] * 2


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_max_skipped_updates_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"max_skipped_updates=.* must be a whole number of at least 1 or None"):
        PPOConfig(max_skipped_updates=value)


# R15: out of memory --------------------------------------------------------------------------------------------------


def fits(rows: int, kind: type[RuntimeError] = RuntimeError, message: str = "CUDA out of memory.") -> Any:
    """The loss on a machine with room for so many rows."""

    def of(model: Weight) -> Any:
        def loss(experience: ActorCritic) -> Loss:
            if len(experience) > rows:
                raise kind(message)
            return model.loss(experience)

        return loss

    return of


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, most: int) -> Tensor:
        ctx.rows, ctx.most = rows, most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.rows > ctx.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return grad, None, None


def fits_backward(rows: int) -> Any:
    """The same, but the room is missing in the backward pass."""

    def of(model: Weight) -> Any:
        def loss(experience: ActorCritic) -> Loss:
            plain = model.loss(experience)
            objective = _Fails.apply(plain.objective, len(experience), rows)
            return Loss(objective=objective, metrics=plain.metrics, arrays=plain.arrays)

        return loss

    return of


@pytest.mark.parametrize("loss", [fits(2), fits(3, torch.OutOfMemoryError), fits_backward(2)])
@pytest.mark.parametrize("rows", [8, 7])
def test_r15_the_microbatch_halves_and_the_step_stays(caplog: pytest.LogCaptureFixture, loss: Any, rows: int) -> None:
    """8 or 7 rows, of which 2 or 3 fit: once 4 (or 3), then 2 (or 1, where 3 do not fit)."""
    plenty = run(fits(100), minibatches=3, rows=rows)
    w, history, guards = run(loss, minibatches=3, rows=rows)
    assert_close(w, plenty[0], 1e-6)
    for ours, theirs in zip(history, plenty[1], strict=True):
        assert_close(ours.means["loss/total"], theirs.means["loss/total"], 1e-6)
        assert_close(ours.arrays["x"], theirs.arrays["x"], 1e-6)
    assert guards.largest_microbatch is not None and guards.largest_microbatch <= 3
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        f"out of memory with a microbatch of {rows}: reducing it to {rows // 2}; minibatches stay the same"
    )
    assert len(lines) <= 2  # each time once, and not again for the second and third minibatch


def test_r15_with_room_for_a_single_row_it_goes_on_and_with_none_the_error_is_the_users() -> None:
    assert_close(run(fits(1))[0], run(fits(100))[0], 1e-6)
    with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
        run(fits(0))
    assert any(entry.name == "loss" for entry in raised.traceback)  # where it happened
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(fits_backward(0))
    with pytest.raises(RuntimeError, match="another thing") as raised:
        run(fits(2, message="another thing"))


def test_r15_ranks_agree_on_the_microbatch() -> None:
    """One that cut alone would ask for more sums than the other, and one that gave up would leave the other waiting."""
    ranks = Ranks(2).run(lambda i, reduce: run(fits(2 if i else 100), 2, processes=2, reduce=reduce))
    plenty = Ranks(2).run(lambda i, reduce: run(fits(100), 2, processes=2, reduce=reduce))
    for (w, _, guards), (expected, _, _) in zip(ranks, plenty):
        assert_close(w, expected, 1e-6)
        assert guards.largest_microbatch == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        Ranks(2).run(lambda i, reduce: run(fits(0 if i else 100), processes=2, reduce=reduce))


def test_r15_through_the_trainer_and_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: Any
) -> None:
    from trl.algorithms.ppo import ppo_loss

    def with_little_room(policy: nn.Module, settings: Any) -> Any:
        loss = ppo_loss(policy, settings)

        def limited(experience: ActorCritic) -> Loss:
            if len(experience) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return loss(experience)

        return limited

    plenty, tight = trainer(max_grad_norm=0.5), trainer(max_grad_norm=0.5)
    expected = [plenty.step(*batch(i)) for i in range(2)]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("trl.algorithms.ppo.ppo_loss", with_little_room)
        found = [tight.step(*batch(i)) for i in range(2)]
    assert caplog.text.count("out of memory with a microbatch") == 2  # 8, then 4
    for name in ("ppo/loss/total", "ppo/grad_norm", "objective/kl", "ppo/policy/entropy"):
        for one, other in zip(found, expected):
            assert_close(one[name], other[name], 1e-5)
    weights = plenty.model.state_dict()
    for name, weight in tight.model.state_dict().items():
        assert_close(weight, weights[name], 1e-5)
    tight.save_checkpoint(tmp_path)
    other = trainer(max_grad_norm=0.5)
    other.load_checkpoint(tmp_path)
    assert other.guards.largest_microbatch == 2  # another cut would round differently
