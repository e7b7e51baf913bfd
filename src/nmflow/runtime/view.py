"""What a reader of `.weight` gets from a compressed layer: shape and dtype at once, the dense numbers when used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Answered by the placeholder itself. T5 asks for `wo.weight.dtype` several times a forward, and unpacking the
# weight each time would cost more than the layer.
_METADATA: frozenset[Callable[..., Any]] = frozenset(
    {
        Tensor.dtype.__get__,  # type: ignore[attr-defined]  # stubs call it a value
        Tensor.shape.__get__,  # type: ignore[attr-defined]  # stubs call it a value
        Tensor.ndim.__get__,  # type: ignore[attr-defined]  # stubs call it a value
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]  # stubs call it a value
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
    }
)
_WRITES = frozenset({"__set__", "__setitem__"}) | {
    f"__i{operation}__" for operation in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class WeightView(Tensor):
    """A tensor without storage that unpacks a compressed weight at the first use of its numbers.

    Every function and method of torch sees the dense tensor in its place; nothing is kept between two of them.
    Writing into it raises `RuntimeError`: the numbers live in the compressed form.
    """

    _unpack: Callable[[], Tensor]
    _device: torch.device

    @staticmethod
    def of(unpack: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> WeightView:
        """A view of what `unpack()` returns: a tensor of this shape, with dtype and device of `like`."""
        placeholder = torch.empty(shape, dtype=like.dtype, device="meta")
        view: WeightView = placeholder.as_subclass(WeightView)
        view._unpack = unpack
        view._device = like.device
        return view

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # read only here
        return self._device

    @property
    def data(self) -> Tensor:  # type: ignore[override]  # read only here
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's
        written = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(kwargs.get("out"), WeightView) or (
            isinstance(written, WeightView) and _writes(getattr(func, "__name__", ""))
        ):
            raise RuntimeError(
                f"{func.__name__} would write into a compressed weight, which is read only; change the dense model "
                "(nmflow.decompress(model)) and compress that"
            )
        dense_args, dense_kwargs = tree_map_only(WeightView, lambda view: view._unpack(), (args, dict(kwargs)))
        return func(*dense_args, **dense_kwargs)


def _writes(name: str) -> bool:
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))
