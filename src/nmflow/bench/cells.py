"""What one measurement is: a product, a convolution, or the step from W to W~, with times, ratios and goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

OURS, DENSE, PACKED, CSR = "nmflow", "F.linear", "oneDNN packed", "torch CSR"
"""The contenders of a product; DENSE is a call of `nn.Linear`."""

READING = "reading"
"""Beside the contenders where weights come from memory: reading it, and nothing else."""

CONV, CONV_LAST = "F.conv2d", "F.conv2d, channels last"
"""Torch's convolution of an input in either order, beside OURS, the product."""


@dataclass(frozen=True)
class Cell:
    """A product of one shape, pattern and number of tokens. Times are medians, ratios are medians of the rounds'."""

    part: str
    shape: tuple[int, int]
    pattern: str
    tokens: int
    dtype: str
    layers: int
    """Different layers that were called in turn; above 1 no weight is in a cache."""
    us: Mapping[str, float]
    """Microseconds of one call, by contender; who cannot run here, or would take seconds, is not in it."""
    over: Mapping[str, float]
    """How many times as long the contender takes as nmflow."""
    of_peak: float
    """Multiply-adds with kept weights over the measured peak."""
    of_bandwidth: float | None
    """Speed at which the packed weight was read, of the reading speed, at one token. Above 1: it came from a cache."""
    goal: float | None
    tiling: str
    disturbed: int
    """Rounds kept although the process lost a core in them."""
    read_gbs: float | None = None
    """Reading speed in the cell's own rounds, where weights come from memory; else the machine's ceiling counts."""

    @property
    def over_dense(self) -> float:
        """The speed-up that goals speak of."""
        return self.over[DENSE]

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Where the cell stands in a table of the worst shapes."""
        return self.part, self.dtype, self.pattern, self.tokens

    def line(self) -> str:
        """For people."""
        others = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in self.over.items())
        bandwidth = "" if self.of_bandwidth is None else f", {self.of_bandwidth:.0%} of reading"
        bandwidth += "" if self.read_gbs is None else f" at {self.read_gbs:.0f} GB/s"
        goal = "" if self.goal is None else f"  goal {self.goal:g} {'yes' if self.over_dense >= self.goal else 'NO'}"
        return (
            f"{self.part:6} {self.shape[0]:>5}x{self.shape[1]:<5}{self.pattern:>6}{self.tokens:>6}  "
            f"{self.us[OURS]:9.1f} us  {others}  ({self.of_peak:.0%} of peak{bandwidth}){goal}  {self.tiling}"
            f"{_disturbed(self.disturbed)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "us": dict(self.us), "over": dict(self.over)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Cell:
        """The inverse of `to_dict`, also by way of JSON."""
        return cls(**{**found, "shape": (found["shape"][0], found["shape"][1])})


@dataclass(frozen=True)
class ConvCell:
    """A convolution of one image, as a sparse product. Times are medians, ratios are medians of the rounds'."""

    layer: tuple[int, int, int, int, int]
    """(channels in, channels out, kernel, stride, side of the input)."""
    pattern: str
    dtype: str
    us: Mapping[str, float]
    over: Mapping[str, float]
    """How many times as long torch's convolution takes as windows and product together, by order of the input."""
    product: bool
    """What the layer chooses: the product, or torch's convolution with the dense weight."""
    disturbed: int

    @property
    def name(self) -> str:
        """`3x3 64-128 of 56²`, a stride where there is one."""
        channels, out_channels, kernel, stride, side = self.layer
        return f"{kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} {channels}-{out_channels} of {side}²"

    def line(self) -> str:
        """For people."""
        others = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in self.over.items())
        chosen = "product" if self.product else "convolution"
        return (
            f"conv   {self.name:22}{self.pattern:>6}  {self.us[OURS]:9.1f} us  {others}  the layer takes the {chosen}"
            f"{_disturbed(self.disturbed)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "us": dict(self.us), "over": dict(self.over)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> ConvCell:
        """The inverse of `to_dict`, also by way of JSON."""
        return cls(**{**found, "layer": tuple(found["layer"])})


@dataclass(frozen=True)
class MaskCell:
    """The step W -> (mask, W~) on one weight: nanoseconds an entry, medians; ratios are medians of the rounds'."""

    shape: tuple[int, int]
    pattern: str
    dtype: str
    ns: Mapping[str, float]
    over_argsort: float
    over_torch: float
    of_copy: float
    """Time of torch's copy of W over time of the step: 1 is copy speed."""
    goal_over_argsort: float | None
    goal_of_copy: float | None
    disturbed: int

    def line(self) -> str:
        """For people."""
        goals = []
        if self.goal_over_argsort is not None:
            goals.append(f"x{self.goal_over_argsort:g} {_yes(self.over_argsort >= self.goal_over_argsort)}")
        if self.goal_of_copy is not None:
            goals.append(f"{self.goal_of_copy:.0%} of copy {_yes(self.of_copy >= self.goal_of_copy)}")
        return (
            f"masks  {self.shape[0]:>5}x{self.shape[1]:<5}{self.pattern:>6}  {self.ns[OURS]:7.3f} ns an entry  "
            f"argsort x{self.over_argsort:.1f}  plain torch x{self.over_torch:.1f}  {self.of_copy:.0%} of copy speed"
            f"{'  goal ' if goals else ''}{', '.join(goals)}{_disturbed(self.disturbed)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ns": dict(self.ns)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> MaskCell:
        """The inverse of `to_dict`, also by way of JSON."""
        return cls(**{**found, "shape": (found["shape"][0], found["shape"][1])})


def _disturbed(rounds: int) -> str:
    return f"  ({rounds} disturbed round{'s' * (rounds > 1)})" if rounds else ""


def _yes(reached: bool) -> str:
    return "yes" if reached else "NO"
