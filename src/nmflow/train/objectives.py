"""What is asked of a network: the loss that it is trained by, and the measures that it is judged by.

Shape suffixes: B items, T tokens of an item, C classes, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.train.config_sections import OptimConfig

Outcomes = dict[str, Tensor]
"""What is kept of every item of a split until all are there, tensors [B]; among them `loss`, the sum over the places of
an item that count, and `count`, how many those are (one, but for tokens)."""

NOT_COUNTED = -100
"""As a target: this place is padding."""


class Objective(Protocol):
    """A loss and measures; the first measure is the one a run is judged by."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of `nmflow.report.measures`."""
        ...

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The scalar to train by: a mean over the batch. `smoothing`: part of each target spread over all classes."""
        ...

    def outcomes(self, logits: Tensor, targets: Tensor) -> Outcomes:
        """What `figures` needs of these items."""
        ...

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        """Every measure over all items."""
        ...


@dataclass(frozen=True)
class Classify:
    """One of C classes an item: logits [B, C], targets int64 [B].

        loss = mean of -Σ_c p_c·log softmax(logits)_c, in float32,    p = (1 - smoothing)·onehot(target) + smoothing / C

    `binary` asks C questions of yes or no in place of one choice, with the same p (Wightman et al. 2021):

        loss = mean over items and classes of -p_c·log σ(logit_c) - (1 - p_c)·log(1 - σ(logit_c))

    Measures may be accuracy, top5, f1 (of class 1) and matthews; `score` is the mean of the others.
    """

    measures: tuple[str, ...] = ("accuracy",)
    binary: bool = False

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        if self.binary:
            return _binary_losses(logits, targets, smoothing).mean()
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def outcomes(self, logits: Tensor, targets: Tensor) -> Outcomes:
        losses = _binary_losses if self.binary else partial(F.cross_entropy, reduction="none")
        found = {
            "loss": losses(logits.float(), targets),
            "count": torch.ones_like(targets),
            "predicted": logits.argmax(dim=-1),
            "target": targets,
        }
        if "top5" in self.measures:
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            found["in_top5"] = (best == targets.unsqueeze(-1)).any(dim=-1)
        return found

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        predicted, target = outcomes["predicted"], outcomes["target"]
        figures: dict[str, float] = {}
        for name in self.measures:
            if name == "accuracy":
                figures[name] = _mean(predicted == target)
            elif name == "top5":
                figures[name] = _mean(outcomes["in_top5"])
            elif name == "f1":
                figures[name] = _f1(predicted, target)
            elif name == "matthews":
                figures[name] = _matthews(predicted, target)
        return _with_score(figures, self.measures)


@dataclass(frozen=True)
class Regress:
    """One number an item: logits [B, 1], targets float [B]; loss = mean of (logit - target)²."""

    measures: tuple[str, ...] = ("score", "pearson", "spearman")

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        if smoothing:
            raise ValueError("a number has no classes to spread its target over")
        return F.mse_loss(logits.squeeze(-1).float(), targets)

    def outcomes(self, logits: Tensor, targets: Tensor) -> Outcomes:
        predicted = logits.squeeze(-1).float()
        count = torch.ones_like(targets, dtype=torch.int64)
        return {"loss": (predicted - targets) ** 2, "count": count, "predicted": predicted, "target": targets}

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        from scipy import stats

        predicted, target = outcomes["predicted"].double().numpy(), outcomes["target"].double().numpy()
        if predicted.std() == 0 or target.std() == 0:  # the correlation with a constant is none
            figures = {"pearson": 0.0, "spearman": 0.0}
        else:
            figures = {
                "pearson": float(stats.pearsonr(predicted, target).statistic),
                "spearman": float(stats.spearmanr(predicted, target).statistic),
            }
        return _with_score(figures, self.measures)


@dataclass(frozen=True)
class PredictTokens:
    """The next token at every place: logits [B, T, V], targets int64 [B, T], NOT_COUNTED where there is none.

        loss = mean of -log softmax(logits)[target] over all places that count, in float32;      perplexity = exp(loss)
    """

    measures: tuple[str, ...] = ("perplexity", "accuracy")

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        logits_NV, target_N = logits.flatten(0, -2).float(), targets.flatten()
        return F.cross_entropy(logits_NV, target_N, label_smoothing=smoothing, ignore_index=NOT_COUNTED)

    def outcomes(self, logits: Tensor, targets: Tensor) -> Outcomes:
        logits_NV, target_N = logits.flatten(0, -2).float(), targets.flatten()
        loss_N = F.cross_entropy(logits_NV, target_N, reduction="none", ignore_index=NOT_COUNTED)
        return {
            "loss": loss_N.view_as(targets).double().sum(dim=1),
            "count": (targets != NOT_COUNTED).sum(dim=1),
            "right": (logits.argmax(dim=-1) == targets).sum(dim=1),
        }

    def figures(self, outcomes: Mapping[str, Tensor]) -> dict[str, float]:
        loss, count = mean_loss(outcomes), int(outcomes["count"].sum())
        figures = {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": int(outcomes["right"].sum()) / count,
        }
        return {name: figures[name] for name in self.measures}


def trained_by(objective: Objective, config: OptimConfig) -> Objective:
    """The objective with the loss that a configuration asks for. Raises `ValueError` where it has no such loss."""
    if config.label_smoothing and isinstance(objective, Regress):
        raise ValueError("optim.label_smoothing: a number has no classes to spread it over; set it to 0")
    if config.loss is None:
        return objective
    if not isinstance(objective, Classify):
        raise ValueError(f"optim.loss: {config.loss} is for one class an item, as of images; leave it out")
    return replace(objective, binary=config.loss == "bce")


def mean_loss(outcomes: Mapping[str, Tensor]) -> float:
    """The loss over all places that count."""
    return float(outcomes["loss"].double().sum()) / int(outcomes["count"].sum())


def _binary_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over the classes of every item [B]."""
    classes = logits.shape[-1]
    wanted_BC = (1 - smoothing) * F.one_hot(targets, classes) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits.float(), wanted_BC, reduction="none").mean(dim=-1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _f1(predicted: Tensor, target: Tensor) -> float:
    """2·TP / (2·TP + FP + FN) of class 1; 0 where nothing is or is called class 1."""
    true = int(((predicted == 1) & (target == 1)).sum())
    wrong = int(((predicted == 1) != (target == 1)).sum())
    return 2 * true / (2 * true + wrong) if true else 0.0


def _matthews(predicted: Tensor, target: Tensor) -> float:
    """The correlation of prediction and target, over any number of classes; 0 where one of them is constant."""
    from sklearn.metrics import matthews_corrcoef

    if bool((predicted == predicted[0]).all()) or bool((target == target[0]).all()):
        return 0.0
    return float(matthews_corrcoef(target.numpy(), predicted.numpy()))


def _with_score(figures: dict[str, float], measures: tuple[str, ...]) -> dict[str, float]:
    """In the order of `measures`; `score` is the mean of the others."""
    if "score" in measures:
        figures = {"score": sum(figures.values()) / len(figures), **figures}
    return {name: figures[name] for name in measures}


def in_order(parts: Sequence[Outcomes], order: Tensor) -> Outcomes:
    """The outcomes of all items in their order; batch by batch they were taken in `order`, a permutation."""
    places = order.argsort()
    return {name: torch.cat([part[name] for part in parts])[places] for name in parts[0]}


def interleaved(shares: Sequence[Sequence[Outcomes]]) -> Outcomes:
    """The outcomes of all items in their order; process p of P had items p, p + P, ..., in batches."""
    mine = [{name: torch.cat([part[name] for part in share]) for name in share[0]} for share in shares if share]
    whole: Outcomes = {}
    for name, first in mine[0].items():
        rows = sum(len(outcomes[name]) for outcomes in mine)
        whole[name] = first.new_empty((rows, *first.shape[1:]))
        for process, outcomes in enumerate(mine):
            whole[name][process :: len(shares)] = outcomes[name]
    return whole
