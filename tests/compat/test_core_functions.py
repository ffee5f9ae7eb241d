"""What the functions of `trl.core` return: by hand where it can be worked out, else as observed on TRL 0.4.6.

Where 0.4.6 was wrong (nan for one value, a mask that does not broadcast, padding at the wrong end of the tensor) the
right thing stands here.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, poison, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer, with_cache_called
from trl import core

X = torch.arange(12.0).reshape(3, 4)
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]])
COUNTED = [0.0, 1.0, 4.0, 5.0, 6.0, 9.0, 10.0, 11.0]  # mean 5.75, sum of squared distances 115.5
AS_BOOL_INT_FLOAT = pytest.mark.parametrize("mask", [MASK.bool(), MASK, MASK.float(), MASK * 0.5])


class TestMasked:
    @AS_BOOL_INT_FLOAT
    def test_mean(self, mask: Tensor) -> None:
        assert_close(core.masked_mean(X, mask), 5.75)
        assert_close(core.masked_mean(X, mask, axis=1), [0.5, 5.0, 10.0])
        assert_close(core.masked_mean(X, mask, 0), [2.0, 5.0, 8.0, 11.0])
        assert_close(core.masked_mean(X, mask, axis=-1), [0.5, 5.0, 10.0])
        assert_close(core.masked_mean(X, mask, axis=(0, 1)), 5.75)

    @AS_BOOL_INT_FLOAT
    def test_var(self, mask: Tensor) -> None:
        assert_close(core.masked_var(X, mask), 115.5 / 7)
        assert_close(core.masked_var(X, mask, unbiased=False), 115.5 / 8)

    @AS_BOOL_INT_FLOAT
    def test_whiten(self, mask: Tensor) -> None:
        white = core.masked_whiten(X, mask)
        assert_close(white, (X - 5.75) / math.sqrt(115.5 / 7))  # every position, on the mask or not
        assert_close(white[MASK.bool()].mean(), 0.0)
        assert_close(white[MASK.bool()].var(), 1.0)
        assert_close(core.masked_whiten(X, mask, shift_mean=False), (X - 5.75) / math.sqrt(115.5 / 7) + 5.75)

    def test_whole_numbers(self) -> None:
        assert_close(core.masked_mean(X.long(), MASK), 5.75)
        assert_close(core.masked_var(X.long(), MASK), 115.5 / 7)
        assert_close(core.whiten(torch.tensor([1, 2, 3])), [-1.0, 0.0, 1.0])

    def test_mask_broadcasts(self) -> None:
        columns = torch.tensor([1.0, 0.0, 1.0, 0.0])
        assert_close(core.masked_mean(X, columns), (0 + 2 + 4 + 6 + 8 + 10) / 6)

    def test_nothing_and_one_value(self) -> None:
        nothing, one = torch.zeros_like(MASK), torch.zeros_like(MASK)
        one[1, 2] = 1
        assert_close(core.masked_mean(X, nothing), 0.0)
        assert_close(core.masked_var(X, nothing), 0.0)
        assert_close(core.masked_mean(X, one), 6.0)
        assert_close(core.masked_var(X, one), 0.0)
        assert_close(core.masked_whiten(X, one)[1, 2], 0.0)

    @pytest.mark.parametrize("value", [float("nan"), 1e9])
    def test_what_stands_off_the_mask_is_not_read(self, value: float) -> None:
        poisoned = poison(X, MASK, value)
        assert_close(core.masked_mean(poisoned, MASK), 5.75)
        assert_close(core.masked_mean(poisoned, MASK, axis=1), [0.5, 5.0, 10.0])
        assert_close(core.masked_var(poisoned, MASK), 115.5 / 7)
        counted = core.masked_whiten(poisoned, MASK)[MASK.bool()]
        assert_close(counted, (torch.tensor(COUNTED) - 5.75) / math.sqrt(115.5 / 7))

    def test_whiten_without_a_mask(self) -> None:
        x = torch.arange(12.0)  # mean 5.5, variance 143 / 11
        assert_close(core.whiten(x), (x - 5.5) / math.sqrt(13))
        assert_close(core.whiten(x.reshape(3, 4), shift_mean=False), ((x - 5.5) / math.sqrt(13) + 5.5).reshape(3, 4))
        assert_close(core.whiten(torch.ones(3)), [0.0, 0.0, 0.0])


class TestLogits:
    def test_logprobs(self) -> None:
        logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]])) + 5
        assert_close(core.logprobs_from_logits(logits, torch.tensor([[2, 1]])), [[math.log(0.5), math.log(0.2)]])

    def test_logprobs_of_half_precision_logits_are_float32(self) -> None:
        assert core.logprobs_from_logits(torch.zeros(1, 2, 3).bfloat16(), torch.tensor([[0, 1]])).dtype == torch.float32

    def test_logprobs_of_the_whole_vocabulary(self) -> None:
        logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]])) + 5
        expected = [[[math.log(p) for p in row] for row in ((0.2, 0.3, 0.5), (0.7, 0.2, 0.1))]]
        assert_close(core.logprobs_from_logits(logits, None, gather=False), expected)
        assert core.logprobs_from_logits(logits.bfloat16(), torch.tensor([[0, 1]]), gather=False).dtype == torch.float32
        with pytest.raises(ValueError, match="labels=None"):
            core.logprobs_from_logits(logits, None)

    def test_labels_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 3\)"):
            core.logprobs_from_logits(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64))

    def test_entropy(self) -> None:
        assert_close(core.entropy_from_logits(torch.zeros(2, 5, 8)), torch.full((2, 5), math.log(8)))
        assert_close(core.entropy_from_logits(torch.tensor([[0.0, -math.inf]])), [0.0])
        logits = torch.log(torch.tensor([0.2, 0.3, 0.5])) + 7
        assert_close(core.entropy_from_logits(logits), -sum(p * math.log(p) for p in (0.2, 0.3, 0.5)))

    def test_both_carry_gradients(self) -> None:
        logits = torch.zeros(1, 1, 2, requires_grad=True)
        core.logprobs_from_logits(logits, torch.tensor([[0]])).sum().backward()
        assert_close(logits.grad, [[[0.5, -0.5]]])
        logits = torch.log(torch.tensor([0.2, 0.8])).requires_grad_()
        core.entropy_from_logits(logits).backward()
        h = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
        assert_close(logits.grad, [-0.2 * (math.log(0.2) + h), -0.8 * (math.log(0.8) + h)])


class TestClipByValue:
    def test_bounds_are_tensors_or_numbers(self) -> None:
        x = torch.tensor([-2.0, 0.0, 2.0, 0.5])
        assert_close(core.clip_by_value(x, -1.0, 1.0), [-1.0, 0.0, 1.0, 0.5])
        lower, upper = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0, 1.0])
        assert_close(core.clip_by_value(x, lower, upper), [0.0, 1.0, 1.0, 1.0])
        assert_close(core.clip_by_value(x, torch.tensor(3.0), 1.0), [3.0, 3.0, 3.0, 3.0])

    def test_gradient_flows_inside_the_bounds_alone(self) -> None:
        x = torch.tensor([-2.0, 0.5, 2.0], requires_grad=True)
        core.clip_by_value(x, torch.full((3,), -1.0), torch.ones(3)).sum().backward()
        assert_close(x.grad, [0.0, 1.0, 0.0])


class TestDictionaries:
    def test_flatten(self) -> None:
        nested = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": {}}
        assert core.flatten_dict(nested) == {"a/b": 1, "a/c/d": 2, "e": [1]}
        assert core.flatten_dict({"a": {"b/c": 1}}, sep=".") == {"a.b/c": 1}

    @pytest.mark.parametrize("nested", [{"a/b": 1}, {"a": {"b/c": 1}}])
    def test_flatten_refuses_ambiguous_keys(self, nested: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="separator '/'"):
            core.flatten_dict(nested)

    def test_stack_pads_with_minus_one(self) -> None:
        stacked = core.stack_dicts(
            [
                {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0), "c": torch.ones(2, 2)},
                {"a": torch.tensor([4.0]), "b": torch.tensor(5.0), "c": torch.zeros(1, 2)},
            ]
        )
        assert core.WANDB_PADDING == -1
        assert_close(stacked["a"], [[1.0, 2.0], [4.0, -1.0]])
        assert_close(stacked["b"], [[3.0], [5.0]])
        assert_close(stacked["c"], [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -1.0, -1.0]])

    def test_average(self) -> None:
        dicts = [
            {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)},
            {"a": torch.tensor([4.0, 1.0]), "n": torch.tensor(2)},
        ]
        average = core.average_torch_dicts(dicts)
        assert_close(average["a"], [2.5, 1.5])
        assert_close(average["n"], 1.5)

    @pytest.mark.parametrize("function", [core.stack_dicts, core.average_torch_dicts])
    def test_keys_must_agree(self, function: Any) -> None:
        with pytest.raises(ValueError, match=r"dict 1 lacks \['a'\]"):
            function([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
        with pytest.raises(ValueError, match="at least one"):
            function([])

    def test_add_suffix(self) -> None:
        assert core.add_suffix({"a": 1, "b": 2}, "_x") == {"a_x": 1, "b_x": 2}

    def test_convert_to_scalar(self) -> None:
        vector, array, column = torch.tensor([1.0, 2.0]), np.array([1, 2]), torch.tensor([[3]])
        stats = {"a": torch.tensor(1.5), "b": torch.tensor([2.0]), "c": np.array([4.0]), "d": np.array(5)}
        kept = {"e": vector, "f": array, "g": "x", "h": 1, "i": [1], "j": column}
        converted = core.convert_to_scalar(stats | kept)
        assert {name: converted[name] for name in stats} == {"a": 1.5, "b": 2.0, "c": 4.0, "d": 5}
        assert all(not isinstance(converted[name], (Tensor, np.ndarray)) for name in stats)
        assert all(converted[name] is kept[name] for name in kept)

    def test_stats_to_np(self) -> None:
        stats = {
            "vector": torch.tensor([1.0, 2.0], requires_grad=True) * 2,
            "half": torch.ones(2).bfloat16(),
            "whole": torch.tensor(3),
            "array": np.array([4.0]),
            "list": [1, 2],
            "numbers": 1,
            "numpy": np.float32(2.5),
            "bool": True,
        }
        arrays = core.stats_to_np(stats)
        assert arrays["vector"].tolist() == [2.0, 4.0]
        assert arrays["vector"].dtype == arrays["half"].dtype == np.float32
        assert arrays["whole"].dtype == np.int64
        assert arrays["array"] is stats["array"]
        assert arrays["list"] == [1, 2]
        for name, expected in {"numbers": 1.0, "numpy": 2.5, "bool": 1.0}.items():
            assert type(arrays[name]) is float
            assert arrays[name] == expected


class TestBatches:
    def test_pad_to_size(self) -> None:
        tokens = torch.tensor([[1, 2], [3, 4]])
        assert core.pad_to_size(tokens, 4).tolist() == [[1, 2, 50256, 50256], [3, 4, 50256, 50256]]
        assert core.pad_to_size(tokens, 3, padding=9).tolist() == [[1, 2, 9], [3, 4, 9]]
        assert core.pad_to_size(tokens, 3, dim=0, padding=9).tolist() == [[1, 2], [3, 4], [9, 9]]
        assert core.pad_to_size(torch.tensor([1, 2]), 3, dim=-1, padding=0).tolist() == [1, 2, 0]
        assert core.pad_to_size(tokens, 2) is tokens

    def test_pad_to_size_never_cuts(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 3\) is longer than size=2"):
            core.pad_to_size(torch.zeros(2, 3), 2)
        with pytest.raises(ValueError, match=r"dim=1 is not a dimension of a tensor of shape \(3,\)"):
            core.pad_to_size(torch.zeros(3), 4)

    def test_listify_batch(self) -> None:
        rows = core.listify_batch(torch.arange(6).view(3, 2))
        assert isinstance(rows, list)
        assert [row.tolist() for row in rows] == [[0, 1], [2, 3], [4, 5]]
        assert [row.shape for row in core.listify_batch(torch.arange(3))] == [()] * 3

    def test_build_bert_batch(self) -> None:
        tokens, attention = core.build_bert_batch_from_txt(["w4 w5 w6", "w7", "w8 w9"], tiny_tokenizer(), "cpu")
        assert tokens.tolist() == [[4, 5, 6], [7, 0, 0], [8, 9, 0]]
        assert tokens.dtype == torch.int64
        assert attention.tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
        assert attention.dtype == torch.float32

    def test_build_bert_batch_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="at least one text"):
            core.build_bert_batch_from_txt([], tiny_tokenizer(), "cpu")


class TestRandomness:
    def test_set_seed_seeds_three_generators(self) -> None:
        import random

        def draw() -> tuple[float, float, float]:
            return random.random(), float(np.random.rand()), float(torch.rand(1))

        core.set_seed(3)
        first = draw()
        assert all(a != b for a, b in zip(first, draw(), strict=True))
        core.set_seed(3)
        assert draw() == first

    def test_lengths_leave_the_upper_bound_out(self) -> None:
        core.set_seed(0)
        sampler = core.LengthSampler(2, 8)
        lengths = [sampler() for _ in range(200)]
        assert set(lengths) == {2, 3, 4, 5, 6, 7}
        assert all(type(length) is int for length in lengths)
        assert {core.LengthSampler(2, 3)() for _ in range(5)} == {2}

    def test_lengths_follow_from_numpys_seed(self) -> None:
        np.random.seed(0)
        sampler = core.LengthSampler(2, 8)
        assert [sampler() for _ in range(10)] == [6, 7, 2, 5, 5, 5, 3, 5, 7, 4]  # as TRL 0.4.6 drew them

    @pytest.mark.parametrize(("low", "high"), [(2, 2), (3, 2)])
    def test_empty_range_of_lengths(self, low: int, high: int) -> None:
        with pytest.raises(ValueError, match=f"min_value={low}.*max_value={high}"):
            core.LengthSampler(low, high)


class TestDecorators:
    @pytest.fixture
    def emptied(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
        return calls

    def test_off_by_default(self, emptied: list[str]) -> None:
        with core.PPODecorators.empty_cuda_cache():
            pass
        assert emptied == []

    def test_context_and_decorator(self, emptied: list[str]) -> None:
        with core.PPODecorators.empty_cuda_cache(True):
            assert emptied == []
        assert emptied == ["emptied"]

        @core.PPODecorators.empty_cuda_cache(True)
        def double(x: int) -> int:
            return 2 * x

        assert (double(3), double(4)) == (6, 8)
        assert emptied == ["emptied"] * 3

    @pytest.mark.parametrize("device", ["cuda", "xpu", "npu"])
    def test_every_kind_of_device(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        calls: list[str] = []
        for name in ("cuda", "xpu", "npu"):
            module = SimpleNamespace(
                is_available=lambda name=name: name == device, empty_cache=lambda name=name: calls.append(name)
            )
            monkeypatch.setattr(torch, name, module, raising=False)

        @core.PPODecorators.empty_device_cache()
        def off() -> None: ...

        @core.PPODecorators.empty_device_cache(True)
        def on() -> None: ...

        off()
        assert calls == []
        on()
        with core.PPODecorators.empty_device_cache(enabled=True):
            assert calls == [device]
        assert calls == [device, device]

    def test_a_users_own_switch_of_devices(self, emptied: list[str]) -> None:
        class Mine(core.PPODecorators):
            optimize_device_cache = True

        with Mine.empty_device_cache(enabled=False):
            pass
        assert emptied == []
        with Mine.empty_device_cache():
            pass
        assert emptied == ["emptied"]

    def test_after_an_error_too(self, emptied: list[str]) -> None:
        with pytest.raises(RuntimeError, match="boom"), core.PPODecorators.empty_cuda_cache(True):
            raise RuntimeError("boom")
        assert emptied == ["emptied"]

    def test_a_users_own_switch(self, emptied: list[str]) -> None:
        class Mine(core.PPODecorators):
            optimize_cuda_cache = True

        with Mine.empty_cuda_cache():
            pass
        assert emptied == ["emptied"]
        assert core.PPODecorators.optimize_cuda_cache is False


class TestFiltering:
    LOGITS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])  # probabilities 0.032, 0.087, 0.237, 0.644

    @pytest.mark.parametrize(
        ("settings", "kept"),
        [
            ({}, 4),
            ({"top_k": 2}, 2),
            ({"top_k": 10}, 4),
            ({"top_k": 1, "min_tokens_to_keep": 3}, 3),
            ({"top_p": 0.5}, 1),
            ({"top_p": 0.7}, 2),
            ({"top_p": 0.9}, 3),
            ({"top_p": 0.0}, 1),
            ({"top_p": 0.0, "min_tokens_to_keep": 2}, 2),
            ({"top_k": 3, "top_p": 0.1}, 1),
        ],
    )
    def test_keeps_the_likeliest(self, settings: dict[str, Any], kept: int) -> None:
        filtered = core.top_k_top_p_filtering(self.LOGITS, **settings)
        for row, logits in zip(filtered, self.LOGITS, strict=True):
            assert sorted(row[row.isfinite()].tolist()) == sorted(logits.tolist())[-kept:]

    def test_filter_value(self) -> None:
        filtered = core.top_k_top_p_filtering(self.LOGITS, top_k=2, filter_value=-5.0)
        assert filtered.tolist() == [[-5.0, -5.0, 3.0, 4.0], [4.0, 3.0, -5.0, -5.0]]
        assert self.LOGITS[0, 0] == 1.0  # the argument is left alone


def greedy(model: Any, queries: Tensor, steps: int) -> Tensor:
    """The likeliest tokens one after another, without a cache: what respond_to_batch with top_k=1 must give."""
    tokens = queries
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, queries.shape[1] :]


class TestRespondToBatch:
    QUERIES = torch.tensor([[4, 5, 6], [7, 8, 9]])

    @pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_twenty_tokens_behind_each_query(self, build: Any, wrapped: bool) -> None:
        from trl import AutoModelForCausalLMWithValueHead

        model = AutoModelForCausalLMWithValueHead.from_pretrained(build()) if wrapped else build()
        responses = core.respond_to_batch(model, self.QUERIES)
        assert responses.shape == (2, 20)
        assert responses.dtype == torch.int64
        assert 0 <= int(responses.min()) <= int(responses.max()) < 61

    @pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_cache_changes_nothing(self, build: Any, wrapped: bool) -> None:
        from trl import AutoModelForCausalLMWithValueHead

        plain = build(initializer_range=0.5)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(plain) if wrapped else plain
        expected = greedy(plain, self.QUERIES, 12)
        assert len(set(expected.flatten().tolist())) > 3  # not one token over and over
        assert core.respond_to_batch(model, self.QUERIES, txt_len=12, top_k=1).tolist() == expected.tolist()
        assert core.respond_to_batch(model, self.QUERIES, txt_len=12, top_p=1e-9).tolist() == expected.tolist()

    def test_cache_is_used(self) -> None:
        model, widths = tiny_gpt2(), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        core.respond_to_batch(model, self.QUERIES, txt_len=4)
        assert widths == [3, 1, 1, 1]

    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
    def test_the_cache_goes_by_the_name_that_the_forward_has_for_it(self, keyword: str, wrapped: bool) -> None:
        from trl.models import AutoModelForCausalLMWithValueHead

        plain = tiny_gpt2(initializer_range=0.5)
        expected = greedy(plain, self.QUERIES, 4)
        plain, seen = with_cache_called(keyword, plain)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(plain) if wrapped else plain
        assert core.respond_to_batch(model, self.QUERIES, txt_len=4, top_k=1).tolist() == expected.tolist()
        assert len(seen) == 4 and None not in seen

    @pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
    def test_model_without_a_cache(self, keyword: str) -> None:
        plain = tiny_gpt2(initializer_range=0.5)
        expected = greedy(plain, self.QUERIES, 6)
        plain, _ = with_cache_called(keyword, plain)
        forward = plain.forward
        plain.forward = lambda **kwargs: forward(**{k: v for k, v in kwargs.items() if k != keyword})
        assert core.respond_to_batch(plain, self.QUERIES, txt_len=6, top_k=1).tolist() == expected.tolist()

    def test_state_space_model(self) -> None:
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
        model = MambaForCausalLM(config).eval()
        expected = greedy(model, self.QUERIES, 6)
        assert core.respond_to_batch(model, self.QUERIES, txt_len=6, top_k=1).tolist() == expected.tolist()

    def test_a_cache_that_cannot_say_how_long_it_is(self) -> None:
        """From transformers 5.24 on a Mamba's recurrent states go by the name of a key-value cache."""
        from transformers import MambaConfig, MambaForCausalLM

        class Renamed(MambaForCausalLM):
            def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> Any:
                return super().forward(input_ids, **kwargs)

        config = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
        model = Renamed(config).eval()
        expected = greedy(model, self.QUERIES, 3)
        assert core.respond_to_batch(model, self.QUERIES, txt_len=3, top_k=1).tolist() == expected.tolist()

    def test_tokens_come_at_temperature_one(self) -> None:
        model = tiny_gpt2(initializer_range=0.5)
        queries = torch.tensor([[4, 5, 6]]).expand(4000, 3)
        with torch.no_grad():
            probs = model(input_ids=queries[:1]).logits[0, -1].softmax(-1)
        counts = torch.bincount(core.respond_to_batch(model, queries, txt_len=1).flatten(), minlength=61)
        # Four standard errors of a share, plus one in 4000: a wrong temperature is off by far more.
        assert ((counts / 4000 - probs).abs() < 4 * (probs * (1 - probs) / 4000).sqrt() + 1 / 4000).all()

    def test_same_seed_same_tokens(self) -> None:
        model = tiny_gpt2()
        core.set_seed(1)
        first = core.respond_to_batch(model, self.QUERIES)
        core.set_seed(1)
        assert core.respond_to_batch(model, self.QUERIES).tolist() == first.tolist()

    def test_modes_of_all_submodules_are_restored_and_no_graph_kept(self) -> None:
        model = tiny_gpt2(resid_pdrop=0.5).train()
        model.transformer.h[0].eval()
        before = [module.training for module in model.modules()]
        seen: list[bool] = []
        handle = model.transformer.h[1].register_forward_hook(lambda module, args, output: seen.append(module.training))
        responses = core.respond_to_batch(model, self.QUERIES, txt_len=3)
        handle.remove()
        assert seen == [False] * 3
        assert [module.training for module in model.modules()] == before
        assert not responses.requires_grad

    def test_context_is_used_to_its_end_and_no_further(self) -> None:
        model = tiny_gpt2(n_positions=16)
        assert core.respond_to_batch(model, self.QUERIES, txt_len=14).shape == (
            2,
            14,
        )  # the last token needs no position
        with pytest.raises(ValueError, match=r"3 tokens and txt_len=15 need 17 positions.*has 16"):
            core.respond_to_batch(model, self.QUERIES, txt_len=15)

    @pytest.mark.parametrize(
        ("queries", "txt_len", "message"),
        [
            (torch.tensor([1, 2]), 3, r"shape \(2,\)"),
            (torch.zeros(2, 0, dtype=torch.int64), 3, r"shape \(2, 0\)"),
            (torch.tensor([[1, 2]]), -1, "txt_len=-1"),
        ],
    )
    def test_bad_arguments(self, queries: Tensor, txt_len: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            core.respond_to_batch(tiny_gpt2(), queries, txt_len)

    def test_no_tokens_wanted(self) -> None:
        assert core.respond_to_batch(tiny_gpt2(), self.QUERIES, txt_len=0).shape == (2, 0)

    def test_encoder_decoder_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"use generate\(\)"):
            core.respond_to_batch(tiny_t5(), self.QUERIES)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
    @pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft passes its prefix so
    @pytest.mark.parametrize("kind", ["lora", "prefix"])
    def test_adapters(self, kind: str) -> None:
        peft = pytest.importorskip("peft")
        if kind == "lora":
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=4,
                init_lora_weights=False,
                target_modules=["c_attn"],
                fan_in_fan_out=True,
            )
        else:
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(tiny_gpt2(initializer_range=0.5), config).eval()
        expected = greedy(model, self.QUERIES, 6)
        assert core.respond_to_batch(model, self.QUERIES, txt_len=6, top_k=1).tolist() == expected.tolist()
