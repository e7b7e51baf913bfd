"""digits: the 1,797 grey 8x8 images that scikit-learn carries; real data without a download."""

from __future__ import annotations

import torch

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.pixels import Pixels
from nmflow.train.data.splits import Data, TensorSplit, rank_in_class
from nmflow.train.objectives import Classify


def load_digits(config: DataConfig) -> Data:
    """Images [1, 8, 8] of 10 classes, split for good: of every ten of a class two are test, one is val.

    Pixels 0 to 16 are brought to mean 0 and variance 1 with the train split's numbers. `augment=True` shifts
    training images by up to one pixel; a mirrored digit would be another one.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    turn = rank_in_class(labels) % 10
    test, val = (turn == 4) | (turn == 9), turn == 7
    train = ~(test | val)
    seen = images[train].to(torch.float64)
    plain = Pixels(mean=(float(seen.mean()),), std=(float(seen.std()),))
    augmented = plain.for_training(config, pad=1 if config.augment else 0, flips=False)
    return Data(
        name="digits",
        kind="images",
        objective=Classify(),
        train=TensorSplit(images[train], labels[train], augmented),
        val=TensorSplit(images[val], labels[val], plain),
        test=TensorSplit(images[test], labels[test], plain),
        num_classes=10,
        sample_shape=(1, 8, 8),
        notes=("the split is fixed and ours",),
    )
