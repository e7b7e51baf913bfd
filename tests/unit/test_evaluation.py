"""A split is judged in batches of like lengths; every item gives what it gives alone, in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.digits import load_digits
from nmflow.train.data.sentences import SentenceSplit
from nmflow.train.data.splits import Data, longest_first
from nmflow.train.loop import evaluate
from nmflow.train.objectives import Classify, Outcomes, in_order


class Numbered(Classify):
    """Also says whether the outcomes stand in the order of the items, whose numbers are their targets."""

    def outcomes(self, logits: Tensor, targets: Tensor) -> Outcomes:
        return {**super().outcomes(logits, targets % 3), "number": targets}

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        numbers = outcomes["number"].tolist()
        return {**super().figures(outcomes), "in order": float(numbers == list(range(len(numbers))))}


class Sums(nn.Module):
    """Logits of whole numbers, so that padding cannot change a bit; remembers the shapes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        total = (input_ids * attention_mask).sum(dim=1)
        return torch.stack([total % 5, total % 7, total % 11], dim=1).float()


def sentences(count: int) -> SentenceSplit:
    torch.manual_seed(0)
    lengths = torch.randint(3, 60, (count,))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return SentenceSplit({"input_ids": torch.randint(1, 1000, (int(starts[-1]),))}, starts, torch.arange(count), {})


def data_of(split: Any) -> Data:
    return Data("made up", "sentences", Numbered(), split, split, split, 3, (60,))


@pytest.mark.parametrize("count", [1, 5, 700])
def test_nobody_can_tell(count: int) -> None:
    split, network = sentences(count), Sums()
    score = evaluate(network, data_of(split), "test", "cpu")
    right, loss = 0, 0.0
    for item in range(count):
        inputs, _ = split.batch(torch.tensor([item]))
        logits = Sums()(**inputs).double()[0]
        loss -= float(logits.log_softmax(-1)[item % 3])
        right += int(logits.argmax()) == item % 3
    assert score.figures == {"accuracy": right / count, "in order": 1.0}
    assert score.loss == pytest.approx(loss / count, rel=1e-6)
    assert score.items == sum(shape[0] for shape in network.shapes) == count


def test_little_is_padded() -> None:
    """As the items lie, nearly every second token would be padding."""
    split, network = sentences(2_000), Sums()
    evaluate(network, data_of(split), "test", "cpu")
    tokens = int(split.starts[-1])
    assert sum(items * longest for items, longest in network.shapes) < 1.2 * tokens
    unsorted = [int(split.lengths[first : first + 256].max()) for first in range(0, 2_000, 256)]
    assert 256 * sum(unsorted) > 1.7 * tokens
    assert network.shapes[0][1] == int(split.lengths.max())  # what does not fit into memory fails at once


def test_a_training_batch_is_as_long_as_its_longest() -> None:
    split = sentences(50)
    for places in ([3], [4, 7, 9], list(range(50))):
        inputs, _ = split.batch(torch.tensor(places))
        longest = max(int(split.starts[place + 1] - split.starts[place]) for place in places)
        assert inputs["input_ids"].shape == (len(places), longest)


def test_items_of_one_length_stay_in_order() -> None:
    digits = load_digits(DataConfig(name="digits"))
    assert longest_first(digits.test, torch.tensor([5, 3, 8])).tolist() == [0, 1, 2]
    assert longest_first(sentences(4), torch.tensor([2, 0])).tolist() in ([0, 1], [1, 0])


def test_outcomes_go_back_to_their_places() -> None:
    parts = [{"a": torch.tensor([40, 20])}, {"a": torch.tensor([30, 10])}]
    assert in_order(parts, torch.tensor([3, 1, 2, 0]))["a"].tolist() == [10, 20, 30, 40]
