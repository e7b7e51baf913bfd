"""What compressing gains a whole network: dense against compressed in turns, and the limit that the rest of it sets."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import nmflow
from nmflow.bench import goals
from nmflow.bench.kernels import Tell
from nmflow.bench.machine import Setup, examine, require_native
from nmflow.bench.networks import Subject, build, make_sparse
from nmflow.bench.settings import ModelSettings
from nmflow.bench.timing import computing, in_turns
from nmflow.ops.native_tune import clock
from nmflow.runtime.modules import NMConv2d, NMLinear
from nmflow.runtime.report import compression_report

_TOLERANCE = 1e-3
_DENSE, _HELPED, _SPARSE = "dense", "dense with our product for few tokens", "compressed"


@dataclass(frozen=True)
class ModelResult:
    """What `nmflow bench model` answers. Times are of one forward, or of one decoded token; medians."""

    setup: Setup
    name: str
    targets: dict[str, str]
    batch: int
    decodes: bool
    weights: int
    """Weights, or row slices of them, that are N:M."""
    kernels: dict[str, int]
    """What multiplies, and with how many of the compressed weights."""
    bytes_dense: int
    bytes_compressed: int
    bytes_of_forms: int
    """Memory beside them: the forms of the weights that kernels made, and read."""
    error: float
    """Largest difference of the outputs over the largest output."""
    dense_ms: float
    helped_ms: float
    """The dense network after `nmflow.for_inference`, which is not about sparsity."""
    compressed_ms: float
    speed_up: float
    share: float
    """Part of the dense network's time that the replaced layers take."""
    goal: float | None
    disturbed: int

    @property
    def bytes_in_memory(self) -> int:
        """Of the compressed network, after all that was timed."""
        return self.bytes_compressed + self.bytes_of_forms

    @property
    def limit(self) -> float:
        """The speed-up if the replaced layers took no time at all (Amdahl)."""
        return 1 / (1 - self.share)

    @property
    def verdict(self) -> goals.Verdict:
        """The speed-up beside its goal."""
        rules = ", ".join(f"{rule}={pattern}" for rule, pattern in self.targets.items())
        return goals.Verdict(f"{self.name}, {rules}, batch {self.batch}, speed-up", self.speed_up, self.goal)

    def summary(self) -> list[str]:
        """For people."""
        kernels = ", ".join(f"{count} by {kernel}" for kernel, count in self.kernels.items())
        what = "decoded token" if self.decodes else "forward"
        per_second = ""
        if self.decodes:
            tokens = self.batch * 1e3
            per_second = f" ({tokens / self.dense_ms:.1f} and {tokens / self.compressed_ms:.1f} tokens/s)"
        return [
            f"{self.weights} weights are N:M; {kernels}",
            f"{self.bytes_dense:,} -> {self.bytes_compressed:,} bytes, {self.bytes_in_memory:,} in memory with the "
            f"forms that kernels read; outputs agree to {self.error:.1e}",
            f"a {what}: dense {self.dense_ms:.2f} ms, compressed {self.compressed_ms:.2f} ms{per_second}",
            *([f"the dense network with for_inference: {self.helped_ms:.2f} ms"] if self.decodes else []),
            f"x{self.speed_up:.2f}; the replaced layers take {self.share:.0%} of the dense time, so x{self.limit:.2f} "
            "if nothing else became faster",
            *goals.disturbed(self.disturbed),
            *goals.short([self.verdict]),
        ]

    def markdown(self) -> str:
        """The same as a page."""
        rules = ", ".join(f"{rule} {pattern}" for rule, pattern in self.targets.items())
        head = [f"# {self.name}: {rules}, batch {self.batch}, float32", ""]
        return "\n".join([*head, *(f"- {line.strip()}" for line in [*self.setup.lines(), *self.summary()]), ""])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        facts = {"format": "nmflow-bench-model", "version": 1, **asdict(self), "limit": self.limit}
        return {**facts, "reached": self.verdict.reached}


def bench_model(name: str, settings: ModelSettings, tell: Tell) -> ModelResult:
    """Time a network dense and compressed. The dense one has the same N:M weights, zeros and all.

    Raises `ValueError` where the native library is missing, or the network, or its targets do not fit, and
    `ArithmeticError` where the two do not give the same outputs.
    """
    require_native()
    with computing(settings.threads):
        subject = build(name, settings.batch, settings.prompt)
        weights = make_sparse(subject.model, settings.targets)
        compressed = nmflow.for_inference(nmflow.compress(subject.model))
        helped = nmflow.for_inference(copy.deepcopy(subject.model))
        setup = examine()
        for line in setup.lines():
            tell(line)
        with torch.inference_mode():
            replaced = [name for name, module in compressed.named_modules() if isinstance(module, NMLinear | NMConv2d)]
            run = _side(subject, compressed, 1) if subject.decodes else (lambda: subject.logits(compressed))
            nmflow.tune(compressed, run)
            error = _difference(subject, compressed)
            models = {_DENSE: subject.model, _HELPED: helped, _SPARSE: compressed}
            sides = {side: _side(subject, model, settings.new_tokens) for side, model in models.items()}
            timed = in_turns(sides, settings.rounds, seconds=0.1, tries=2)
            share = _share(subject, sides[_DENSE], replaced, min(settings.rounds, 5))
    report = compression_report(compressed)
    per_call = settings.new_tokens if subject.decodes else 1
    return ModelResult(
        setup=setup,
        name=name,
        targets=dict(settings.targets),
        batch=settings.batch,
        decodes=subject.decodes,
        weights=weights,
        kernels=dict(Counter(layer.kernel for layer in report.layers)),
        bytes_dense=report.bytes_before,
        bytes_compressed=report.bytes_after,
        bytes_of_forms=report.bytes_of_forms,
        error=error,
        dense_ms=timed.median(_DENSE) / per_call * 1e3,
        helped_ms=timed.median(_HELPED) / per_call * 1e3,
        compressed_ms=timed.median(_SPARSE) / per_call * 1e3,
        speed_up=timed.ratio(_SPARSE, _DENSE),
        share=share,
        goal=goals.of_model(name, settings.targets, settings.batch, settings.threads),
        disturbed=timed.disturbed,
    )


def _difference(subject: Subject, compressed: nn.Module) -> float:
    wanted, found = subject.logits(subject.model), subject.logits(compressed)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= _TOLERANCE:
        raise ArithmeticError(f"{subject.name}: compressed, its outputs differ by {error:.2g} of the largest one")
    return error


def _side(subject: Subject, model: nn.Module, new_tokens: int) -> Callable[[], object]:
    """One forward; or `new_tokens` tokens decoded greedily behind the prompt, which was read before."""
    if not subject.decodes:
        return lambda: subject.logits(model)
    prompt = subject.inputs
    cache = model(prompt, use_cache=True).past_key_values

    def decode() -> None:
        if (written := cache.get_seq_length() - prompt.shape[1]) > 0:
            cache.crop(-written)
        token = prompt[:, -1:]
        for _ in range(new_tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return decode


def _share(subject: Subject, run: Callable[[], object], layers: Sequence[str], rounds: int) -> float:
    """Part of the time of `run` that is spent in these layers of the dense network: the median of the rounds.

    With hooks on its layers torch calls them one by one, where it would fuse a whole encoder layer without.
    """
    now, inside, begun = clock(), 0.0, 0.0

    def enter(module: nn.Module, given: Any) -> None:
        nonlocal begun
        begun = now()

    def leave(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal inside
        inside += now() - begun

    modules = [subject.model.get_submodule(name) for name in layers]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    shares = []
    for _ in range(rounds):
        inside, start = 0.0, now()
        run()
        shares.append(inside / (now() - start))
    for handle in handles:
        handle.remove()
    return sorted(shares)[len(shares) // 2]
