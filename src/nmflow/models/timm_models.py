"""timm:NAME: any model of timm, with channels, classes and image size taken from the data."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmflow.train.config_errors import nearest
from nmflow.train.config_sections import ModelConfig
from nmflow.train.data.splits import Data

_ARGUMENTS = {
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "patch": "patch_size",
    "mlp_ratio": "mlp_ratio",
}
"""Our sizes by the names that timm's vision transformers give them; other families refuse them."""


def build_timm(config: ModelConfig, data: Data) -> nn.Module:
    """A timm model for the images of `data`, fresh unless `model.pretrained=true`.

    Raises `ValueError` where timm is missing, knows no such model, or the model refuses a size.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model: {config.name} needs timm: pip install 'nmflow[timm]'") from error
    name = config.name.removeprefix("timm:")
    if data.kind != "images":
        raise ValueError(
            f"model: {config.name} takes images, not {data.name}; "
            "use lm-tiny for text, transformers:NAME for sentences"
        )
    if not timm.is_model(name):
        raise ValueError(f'model: timm has no "{name}"{nearest(name, timm.list_models())}')
    channels, height, width = data.sample_shape
    arguments: dict[str, Any] = {
        theirs: getattr(config, ours)
        for ours, theirs in _ARGUMENTS.items()
        if getattr(config, ours) is not None
    }
    # Models without a fixed size (most convolutional ones) know no img_size.
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        arguments["img_size"] = (height, width)
    # A ResNet has no patches: what its stem makes of an image plays their part.
    stem_stride = arguments.pop("patch_size", None) if _is_resnet(name) else None
    if config.dropout:
        arguments["drop_rate"] = config.dropout
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=bool(config.pretrained), in_chans=channels, num_classes=data.num_classes, **arguments
        )
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise ValueError(
            f"model: the weights of timm's {name} cannot be had: {error}; fetch them: hf download timm/{name}, "
            "or begin fresh: model.pretrained=false"
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"model: timm's {name} refuses {given or 'these data'}: {error}") from error
    if stem_stride is not None:
        _stride_stem(model, stem_stride, name)
    return model


def _is_resnet(name: str) -> bool:
    import timm

    module: str = timm.model_entrypoint(name).__module__
    return module == "timm.models.resnet"


def _stride_stem(model: nn.Module, stride: int, name: str) -> None:
    """Lets the stem of a ResNet go over the image in steps of `stride` pixels.

    4 is the stem of ImageNet; 2 goes without its pooling and 1 without the stride of its first convolution as well,
    as is the custom for images of 32 pixels: of those, 4 would leave the last stage a single place.
    """
    if stride not in (1, 2, 4):
        raise ValueError(f"model.patch: the stem of timm's {name} can go in steps of 1, 2 or 4 pixels, not {stride}")
    if stride <= 2:
        model.maxpool = nn.Identity()
    if stride == 1:
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).stride = (1, 1)
