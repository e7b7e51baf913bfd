"""Losses and measures against definitions written out, and what processes find separately put together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmflow.report.measures import MEASURES, measures_of
from nmflow.train.config_sections import OptimConfig
from nmflow.train.objectives import NOT_COUNTED, Classify, PredictTokens, Regress, interleaved, mean_loss, trained_by


def counts(predicted: list[int], target: list[int]) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    pairs = list(zip(predicted, target, strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))  # type: ignore[return-value]  # of 4


def one_hot(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_two_classes_by_their_counts(pairs: list[tuple[int, int]]) -> None:
    predicted, target = (list(column) for column in zip(*pairs, strict=True))
    objective = Classify(("score", "accuracy", "f1", "matthews"))
    found = objective.figures(objective.outcomes(one_hot(predicted, 2), torch.tensor(target)))
    tp, fp, fn, tn = counts(predicted, target)
    precision, recall = (tp / (tp + fp) if tp else 0.0), (tp / (tp + fn) if tp else 0.0)
    under = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    wanted = {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "matthews": (tp * tn - fp * fn) / under if under else 0.0,
    }
    assert list(found) == ["score", "accuracy", "f1", "matthews"]
    assert found["score"] == pytest.approx(sum(wanted.values()) / 3)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


def test_the_five_best_classes_count() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(200, 12), torch.randint(12, (200,))
    objective = Classify(("accuracy", "top5"))
    found = objective.figures(objective.outcomes(logits, target))
    ranks = [sorted(row, reverse=True).index(row[t]) for row, t in zip(logits.tolist(), target.tolist(), strict=True)]
    assert found == {"accuracy": sum(r == 0 for r in ranks) / 200, "top5": sum(r < 5 for r in ranks) / 200}
    assert 0 < found["accuracy"] < found["top5"] < 1
    few = objective.figures(objective.outcomes(logits[:, :3], target % 3))
    assert few["top5"] == 1.0


def test_the_loss_is_what_the_outcomes_hold() -> None:
    torch.manual_seed(1)
    cases = [
        (Classify(), torch.randn(9, 4), torch.randint(4, (9,))),
        (Regress(), torch.randn(9, 1), torch.randn(9)),
        (PredictTokens(), torch.randn(3, 5, 7), torch.randint(7, (3, 5))),
        (Classify(binary=True), torch.randn(9, 4), torch.randint(4, (9,))),
    ]
    for objective, logits, target in cases:
        mean = mean_loss(objective.outcomes(logits, target))
        assert float(objective.loss(logits, target)) == pytest.approx(mean, rel=1e-6)
        assert float(objective.loss(logits.bfloat16(), target)) == pytest.approx(mean, rel=0.05)
        assert objective.loss(logits.bfloat16(), target).dtype is torch.float32
    log_probability = cases[2][1].double().log_softmax(-1)
    places = [-float(log_probability[b, t, cases[2][2][b, t]]) for b in range(3) for t in range(5)]
    figures = PredictTokens().figures(PredictTokens().outcomes(cases[2][1], cases[2][2]))
    assert figures["perplexity"] == pytest.approx(math.exp(sum(places) / 15), rel=1e-5)


def test_padding_counts_for_nothing() -> None:
    """Whatever the network says there; as if the sentences were judged one by one, each at its own length."""
    torch.manual_seed(3)
    logits, target, lengths = torch.randn(3, 6, 7), torch.randint(7, (3, 6)), (6, 2, 4)
    for row, length in enumerate(lengths):
        target[row, length:] = NOT_COUNTED
    objective = PredictTokens(("accuracy", "perplexity"))
    outcomes = objective.outcomes(logits, target)
    whole = torch.cat([logits[row, :length] for row, length in enumerate(lengths)])
    wanted = torch.cat([target[row, :length] for row, length in enumerate(lengths)])
    loss = -float(whole.double().log_softmax(-1)[torch.arange(12), wanted].mean())
    assert float(objective.loss(logits, target)) == pytest.approx(loss, rel=1e-5)
    assert mean_loss(outcomes) == pytest.approx(loss, rel=1e-5)
    assert outcomes["count"].tolist() == list(lengths)
    figures = objective.figures(outcomes)
    right = sum(int(row.argmax() == token) for row, token in zip(whole, wanted, strict=True))
    assert figures == pytest.approx({"accuracy": right / 12, "perplexity": math.exp(loss)}, rel=1e-5)


def test_smoothed_targets_by_their_definition() -> None:
    torch.manual_seed(2)
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    log_probability = logits.double().log_softmax(-1)
    wanted = -sum(
        0.7 * log_probability[i, t] + 0.3 * log_probability[i].mean() for i, t in enumerate(target.tolist())
    )
    assert float(Classify().loss(logits, target, 0.3)) == pytest.approx(float(wanted) / 6, rel=1e-5)
    tokens = PredictTokens().loss(logits.view(2, 3, 5), target.view(2, 3), 0.3)
    assert float(tokens) == pytest.approx(float(wanted) / 6, rel=1e-5)
    with pytest.raises(ValueError, match="no classes"):
        Regress().loss(torch.randn(3, 1), torch.randn(3), 0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_questions_of_yes_or_no_by_their_definition(smoothing: float) -> None:
    torch.manual_seed(3)
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    wanted = 0.0
    for row, right in zip(logits.double().sigmoid().tolist(), target.tolist(), strict=True):
        for place, yes in enumerate(row):
            share = (1 - smoothing) * (place == right) + smoothing / 5
            wanted -= share * math.log(yes) + (1 - share) * math.log(1 - yes)
    assert float(Classify(binary=True).loss(logits, target, smoothing)) == pytest.approx(wanted / 30, rel=1e-6)
    timms = pytest.importorskip("timm.loss", reason="timm is not installed").BinaryCrossEntropy(smoothing)
    assert float(timms(logits, target)) == pytest.approx(wanted / 30, rel=1e-6)


def test_the_loss_that_is_asked_for() -> None:
    classify = Classify(("accuracy", "top5"))
    assert trained_by(classify, OptimConfig()) == classify
    assert trained_by(classify, OptimConfig(loss="bce")) == Classify(("accuracy", "top5"), binary=True)
    assert trained_by(Classify(binary=True), OptimConfig(loss="cross-entropy")) == Classify()
    for objective in (Regress(), PredictTokens()):
        assert trained_by(objective, OptimConfig()) is objective
        with pytest.raises(ValueError, match=r"optim\.loss: bce is for one class an item, as of images; leave it out"):
            trained_by(objective, OptimConfig(loss="bce"))
    with pytest.raises(ValueError, match=r"optim\.label_smoothing: a number has no classes"):
        trained_by(Regress(), OptimConfig(label_smoothing=0.1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Places from 1; equal values share the mean of theirs."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_correlations_by_their_definition() -> None:
    generator = np.random.default_rng(0)
    target = np.round(generator.uniform(0, 5, 60), 1)
    predicted = (target + generator.normal(0, 1, 60)).astype(np.float32)
    objective = Regress()
    outcomes = objective.outcomes(torch.from_numpy(predicted).unsqueeze(1), torch.from_numpy(target).float())
    found = objective.figures(outcomes)
    pearson, spearman = (
        float(np.corrcoef(a, b)[0, 1]) for a, b in ((predicted, target), (ranks(predicted), ranks(target)))
    )
    assert found == pytest.approx({"score": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman})
    constant = objective.outcomes(torch.ones(60, 1), torch.from_numpy(target).float())
    assert objective.figures(constant) == {"score": 0.0, "pearson": 0.0, "spearman": 0.0}


@given(items=st.integers(1, 23), processes=st.integers(1, 5), batch=st.integers(1, 4))
def test_shares_of_processes_are_put_in_order(items: int, processes: int, batch: int) -> None:
    loss, rows = torch.arange(items) * 1.5, torch.arange(items * 2).view(items, 2)
    shares = []
    for process in range(processes):
        mine = torch.arange(items)[process::processes].split(batch)
        shares.append([{"loss": loss[part], "rows": rows[part]} for part in mine if len(part)])
    whole = interleaved(shares)
    assert torch.equal(whole["loss"], loss)
    assert torch.equal(whole["rows"], rows)


def test_every_measure_has_a_name_for_people() -> None:
    for objective in (Classify(("score", "accuracy", "f1")), Regress(), PredictTokens()):
        assert set(objective.measures) <= set(MEASURES)
    assert measures_of({"loss": 1.0, "perplexity": 9.0, "accuracy": 0.5, "items": 3}) == ["perplexity", "accuracy"]
    assert MEASURES["perplexity"].number(23.456) == "23.46"
    assert MEASURES["accuracy"].number(-0.0123, sign=True) == "-1.23"
    assert MEASURES["accuracy"].number(None) == ""
