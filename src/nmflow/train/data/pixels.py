"""From the bytes of images to a network's input: what training changes at random, then one scale for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.augment import erase, flip, shift
from nmflow.train.data.policy import Policy, timm_policy


@dataclass(frozen=True)
class Pixels:
    """From bytes [B, C, H, W] to a network's input: augment, (pixel - mean) / std per channel, erase."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    """Pixels by which an augmented image may shift in each direction; 0 for no shifts."""
    flips: bool = False
    """Whether augmentation mirrors left and right."""
    policy: Policy | None = None
    """What else augmentation does to shapes and colours."""
    erased: float = 0.0
    """Probability that augmentation erases a rectangle."""

    def for_training(self, config: DataConfig, pad: int, flips: bool = True) -> Pixels:
        """The same with what a configuration says of training: `augment=false` leaves out shifts, flips and policy.

        Raises `ValueError` as `timm_policy` does.
        """
        pixels = replace(self, erased=config.erase or 0.0)
        if config.augment is False:
            return pixels
        policy = timm_policy(config.augment, self.mean) if isinstance(config.augment, str) else None
        return replace(pixels, pad=pad, flips=flips, policy=policy)

    def __call__(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            if self.pad:
                pixels = shift(pixels, self.pad, generator)
            if self.flips:
                pixels = flip(pixels, generator)
            if self.policy is not None:
                pixels = self.policy(pixels, generator)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        scaled = (pixels.to(torch.float32) - mean) / std
        return erase(scaled, self.erased, generator) if generator is not None and self.erased else scaled
