from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import VOCABULARY, assert_close, tiny_tokenizer
from trl.rewards import ClassifierReward

LABELS = {0: "NEGATIVE", 1: "POSITIVE", 2: "MIXED"}


class Adder(nn.Module):
    """A classifier whose logits can be worked out by hand: label k gets k times the sum of the tokens' numbers."""

    def __init__(self, labels: dict[int, str] = LABELS, rows: int = VOCABULARY) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label=labels, max_position_embeddings=16)
        self.vectors = nn.Embedding(rows, 1)
        self.dropout = nn.Dropout(0.5)
        self.batches: list[tuple[int, int]] = []
        with torch.no_grad():
            self.vectors.weight.copy_(torch.arange(rows)[:, None] / 10)

    def get_input_embeddings(self) -> nn.Module:
        return self.vectors

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        found = self.dropout(self.vectors(input_ids)[..., 0])  # [B, T]
        total = found.masked_fill(attention_mask == 0, 0.0).sum(-1)  # [B]
        return SimpleNamespace(logits=total[:, None] * torch.arange(len(self.config.id2label)))


def reward(**settings: Any) -> ClassifierReward:
    return ClassifierReward(Adder(), tiny_tokenizer(), **settings)


def test_logit_worked_by_hand() -> None:
    assert_close(reward()(["w50 ", "w40 "], ["w5", "w60 w4"]), [5.5, 10.4])
    assert_close(reward(label="MIXED")(["w50 "], ["w5"]), [11.0])


def test_probability_worked_by_hand() -> None:
    # The softmax of 0, 1, 2: e / (1 + e + e^2).
    assert_close(reward(output="probability")(["w4 "], ["w6"]), [2.71828183 / (1 + 2.71828183 + 7.3890561)])


def test_probability_of_a_single_output_is_its_sigmoid() -> None:
    class Single(Adder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(input_ids, attention_mask).logits[:, 1:2])

    model = Single()
    scores = ClassifierReward(model, tiny_tokenizer(), label=0, output="probability")(["w4 "], ["w6"])
    assert_close(scores, [0.73105858])


def test_probability_where_several_labels_may_hold_is_each_labels_sigmoid() -> None:
    model = Adder()
    model.config.problem_type = "multi_label_classification"
    assert_close(ClassifierReward(model, tiny_tokenizer(), output="probability")(["w4 "], ["w6"]), [0.73105858])


def test_order_and_batches() -> None:
    texts = ["w4 w5 w6", "w4", "w5 w6 w7 w8", "w9", "w40 w5"]
    scored = reward(batch_size=2)
    assert_close(scored([""] * 5, texts), [1.5, 0.4, 2.6, 0.9, 4.5])
    # Like lengths share a batch, so the short texts are not padded to the longest.
    assert scored.model.batches[2:] == [(2, 1), (2, 3), (1, 4)]  # after the trial of padding


def test_one_text_scores_as_in_a_batch() -> None:
    texts = ["w4 w5 w6", "w4", "w5 w6 w7 w8"]
    together = reward()([""] * 3, texts)
    assert_close(together, [reward()([""], [text])[0] for text in texts])


def test_tokenizer_without_padding_scores_one_by_one() -> None:
    scored = ClassifierReward(Adder(), tiny_tokenizer(pad=False))
    assert_close(scored(["", ""], ["w4 w5 w6", "w4"]), [1.5, 0.4])
    assert [rows for rows, _ in scored.model.batches] == [1, 1]


def test_too_long_a_text_is_cut() -> None:
    long = " ".join(["w5"] * 40)
    assert_close(reward()([long], [""]), [8.0])  # The model takes 16 tokens.
    assert_close(reward(max_length=3)([long], [""]), [1.5])
    assert_close(reward(max_length=99)([long], [""]), [8.0])


def test_no_texts_no_scores() -> None:
    assert reward()([], []) == []


def test_columns_are_not_read() -> None:
    assert_close(reward()(["w4 "], ["w5"], label=[object()]), [0.9])


def test_42_classifier_reads_text_and_never_the_policys_tokens() -> None:
    """The policy calls `good` 7, the classifier calls it 2: only the text can tell."""
    tokenizer = tiny_tokenizer()
    policys_ids = [7, 8, 9]
    with pytest.raises(ValueError, match=r"completions\[1\] is of type list, not str"):
        ClassifierReward(Adder(), tokenizer)(["w1", "w2"], ["w3", policys_ids])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"completions\[0\] is of type Tensor, not str"):
        ClassifierReward(Adder(), tokenizer)(["w1"], [torch.tensor(policys_ids)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"prompts\[0\] is of type int, not str"):
        ClassifierReward(Adder(), tokenizer)([7], ["w1"])  # type: ignore[list-item]
    # A tokenizer that can say more than the classifier has vectors for is not the classifier's.
    with pytest.raises(ValueError, match="61 tokens, but the classifier embeds only 10"):
        ClassifierReward(Adder(rows=10), tokenizer)
    # The text goes through the classifier's tokenizer, whatever words it is in.
    assert_close(ClassifierReward(Adder(), tokenizer)(["w7 w8"], [" w9"]), [2.4])


@pytest.mark.parametrize("label", ["positive", "Positive", "POSITIVE", 1])
def test_label_by_name_or_index(label: str | int) -> None:
    assert reward(label=label).label == 1


@pytest.mark.parametrize("label", ["joy", 3, -1])
def test_unknown_label_lists_those_there_are(label: str | int) -> None:
    with pytest.raises(ValueError, match="0: NEGATIVE, 1: POSITIVE, 2: MIXED"):
        reward(label=label)


def test_label_that_two_outputs_share() -> None:
    with pytest.raises(ValueError, match="matches 2 labels"):
        ClassifierReward(Adder({0: "good", 1: "Good"}), tiny_tokenizer(), label="good")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"output": "score"}, "output='score'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reward(**settings)


def test_bad_texts() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        reward()(["w1", "w2"], ["w3"])
    with pytest.raises(ValueError, match="prompts is a string"):
        reward()("w1", ["w2"])
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        reward()(["w1", ""], ["w2", ""])


def test_no_tokenizer_to_be_found() -> None:
    with pytest.raises(ValueError, match="pass tokenizer="):
        ClassifierReward(Adder())


def test_leaves_the_surroundings_alone() -> None:
    scored = reward()
    scored.model.train()  # Somebody's slip: dropout must not reach the scores.
    state = torch.get_rng_state()
    assert_close(scored(["w50 "], ["w5"]), [5.5])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in scored.model.parameters())


def test_from_pretrained(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = ClassifierReward.from_pretrained(str(tmp_path), label="negative", device="cpu")
    scores = loaded(["w5 w6 "], ["w7"])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, 0]
    assert_close(scores, [expected])
    assert loaded.max_length == 32
    # The folder that the model came from holds the tokenizer too.
    again = ClassifierReward(loaded.model, label="negative")
    assert_close(again(["w5 w6 "], ["w7"]), scores)


class LastToken(Adder):
    """Reads the last token that is not its config's padding, as decoders of transformers do, and that token's position."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.config.pad_token_id = pad

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        columns = torch.arange(input_ids.shape[1])
        last = (columns * (input_ids != self.config.pad_token_id)).argmax(-1)
        found = self.vectors(input_ids)[torch.arange(len(last)), last, 0] + last
        return SimpleNamespace(logits=found[:, None] * torch.arange(len(self.config.id2label)))


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize(("pad", "side", "harmless"), [(0, "right", True), (9, "right", False), (0, "left", False)])
def test_padding_that_changes_scores_is_not_used(
    output: Any, pad: int, side: str, harmless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = LastToken(pad)
    scored = ClassifierReward(model, tiny_tokenizer(padding_side=side), output=output, label="POSITIVE")
    logits = torch.tensor([[2.6], [0.4], [1.6], [0.8]])  # of the last token's number, and where it stands
    wanted = logits if output == "logit" else (logits * torch.arange(3)).softmax(-1)[:, 1:2]
    assert_close(scored([""] * 4, ["w4 w5 w6", "w4", "w5 w6", "w8"]), wanted[:, 0])
    assert ("padding changes" in caplog.text) is not harmless
    assert model.batches[2:] == ([(4, 3)] if harmless else [(2, 1), (1, 2), (1, 3)])  # after the trial
