"""Which data sets there are, by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.cifar10 import load_cifar10
from nmflow.train.data.digits import load_digits
from nmflow.train.data.glue import load_glue
from nmflow.train.data.images import load_images
from nmflow.train.data.order import batch_indices, share, step_generator
from nmflow.train.data.splits import Data, Inputs, Split, Uneven, longest_first
from nmflow.train.data.text import load_text
from nmflow.train.data.translation import load_translation

__all__ = [
    "LOADERS", "Data", "Inputs", "Split", "Uneven", "batch_indices", "load_data", "longest_first", "share",
    "step_generator",
]  # fmt: skip

LOADERS: dict[str, Callable[[DataConfig, str | None], Data]] = {
    "digits": lambda config, _: load_digits(config),
    "cifar10": lambda config, _: load_cifar10(config),
    "images": lambda config, _: load_images(config),
    "text": load_text,
    "glue": load_glue,
    "translation": load_translation,
}


def load_data(config: DataConfig, tokenizer: str | None = None) -> Data:
    """The data set of a configuration, its splits fixed: no seed changes them. `tokenizer` is for sentences and text.

    Raises `FileNotFoundError` with the expected layout where the path holds no such data, and `ValueError`
    where a file is broken.

    >>> load_data(DataConfig(name="digits")).describe()
    'digits: inputs 1x8x8, 10 classes, 1,264 train, 178 val, 355 test; the split is fixed and ours'
    """
    return LOADERS[config.name](config, tokenizer)
