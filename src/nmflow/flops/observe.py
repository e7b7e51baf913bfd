"""What a network multiplies: one forward of a copy that needs neither memory nor time for numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from nmflow.attach import detach
from nmflow.flops.watch import Product, Watch
from nmflow.runtime.example import run


@dataclass(frozen=True)
class Observation:
    """The products of one forward, and the operators nobody has a formula for."""

    products: tuple[Product, ...]
    unknown: tuple[str, ...]


def observe(model: nn.Module, example: Any) -> Observation:
    """Run a copy of `model` once on `example` (a tensor, positional or keyword arguments) and note its products.

    The copy is of torch's fake tensors, in eval mode, without a sparsifier: neither memory nor time is taken for
    numbers. A network that looks at numbers while it runs is copied and run as it is, where it has them.

    Raises `ValueError` where a network on the meta device does not run without numbers.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # what a closure holds is not copied
    try:
        with _WithoutNumbers(fake):
            twins = copy.deepcopy((model, example))
        with fake, _quiet():
            return _watch(*twins)
    except Exception as error:  # anything may come of asking for numbers that are not there
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"the network does not run without numbers: {error}; give it weights and a real example"
            ) from error
    return _watch(*copy.deepcopy((model, example)))


class _WithoutNumbers(TorchFunctionMode):
    """Within it, deep copies of tensors are fake, whatever object holds them; all say that they are on the CPU."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # how parameters are copied
            return self._twin(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._twin(tensor).requires_grad_(tensor.requires_grad))
        return func(*args, **(kwargs or {}))

    def _twin(self, tensor: Tensor) -> Tensor:
        return FakeTensor(self.fake, tensor.detach().to("meta"), torch.device("cpu"))


def _watch(model: nn.Module, example: Any) -> Observation:
    detach(model)
    model.eval()
    watch = Watch(model, example)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), _taken_apart(), watch:
        run(model, example)
    return Observation(tuple(watch.products), tuple(watch.unknown))


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Without the operators that torch has for a whole attention, and oneDNN and cuDNN for a whole recurrent layer."""
    whole = torch.backends.mha.get_fastpath_enabled()
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(whole)
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a traceback in the log where fake tensors do not fit together: what was raised says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
