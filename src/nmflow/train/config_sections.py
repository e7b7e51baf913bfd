"""The sections of a configuration: data, model, optimizer, and how translations are judged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nmflow.train.config_errors import nearest
from nmflow.train.config_fields import BelowOne, Count, NonNegative, Positive, Settings, items
from nmflow.train.config_policy import check_policy

MODELS = ("vit-tiny", "lm-tiny")
"""Models of our own; `timm:NAME` builds any of timm's, `transformers:NAME` any of transformers'."""

_LIBRARIES = ("timm:", "transformers:")


def _augment_value(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_policy(value)
    raise ValueError(f"expected true, false or a policy of timm such as rand-m9-mstd0.5, found {value!r}")


def data_mapping(value: Any) -> Any:
    """`name:path` as the mapping that it stands for."""
    if not isinstance(value, str):
        return value
    name, colon, path = value.partition(":")
    return {"name": name, "path": path} if colon else {"name": name}


def model_mapping(value: Any) -> Any:
    """A name as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value


_DATA_USERS: dict[str, tuple[str, ...]] = {
    "path": ("cifar10", "images", "text", "glue", "translation"),
    "image_size": ("images",),
    "augment": ("digits", "cifar10", "images"),
    "erase": ("digits", "cifar10", "images"),
    "mixup": ("digits", "cifar10", "images"),
    "context": ("text", "glue", "translation"),
    "languages": ("translation",),
    "vocabulary": ("translation",),
    "tokenizer": ("glue", "text"),
    "like_lengths": ("glue", "translation"),
}


class DataConfig(Settings):
    """Which data; as one string `name` or `name:path`."""

    name: Literal["digits", "cifar10", "images", "text", "glue", "translation"] = "digits"
    """digits (comes with scikit-learn), cifar10, images (of any classes), text, glue (a task) or translation."""
    path: str | None = None
    """File or folder that holds the data; digits needs none. GLUE: a task's folder, or its name on the hub."""
    image_size: Count | None = None
    """Images: edge that photographs are brought to, in training by random crops; none: that of the first image."""
    augment: Annotated[bool | str | None, BeforeValidator(_augment_value)] = None
    """Random shifts or crops, and flips (not of digits); text: and a policy of timm, rand-m9-mstd0.5; none: default."""
    erase: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability that noise overwrites a random rectangle of a training image; none: no."""
    mixup: Positive | None = None
    """Blend training images in pairs, with parts from Beta(mixup, mixup), and their targets likewise; none: no."""
    context: Annotated[int, Field(ge=2)] | None = None
    """Text: tokens in a window. GLUE, translation: most tokens of a sentence. None: 128."""
    languages: Annotated[str, Field(pattern=r"^[a-z]{2,3}-[a-z]{2,3}$")] | None = None
    """Translation: from which language to which, such as en-de; none: what the files' names say."""
    vocabulary: Annotated[int, Field(ge=16)] | None = None
    """Translation: tokens of the vocabulary that is trained on the train part; none: 8000."""
    tokenizer: str | None = None
    """GLUE, text: folder of a tokenizer; none: that of a pretrained model of transformers, or characters."""
    like_lengths: bool | None = None
    """GLUE, translation: train on batches of sentences of like length, so that little is padding; none: no."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return data_mapping(value)

    @model_validator(mode="after")
    def _settings_belong(self) -> DataConfig:
        if self.name != "digits" and self.path is None:
            raise ValueError(f"{self.name} needs a path: data={self.name}:PATH")
        foreign = [
            f"{name} is of no use to {self.name} (it is for {', '.join(users)}); leave it out"
            for name, users in _DATA_USERS.items()
            if getattr(self, name) is not None and self.name not in users
        ]
        if self.name == "digits" and isinstance(self.augment, str):
            foreign.append(f"{self.augment} is for colour, and digits are grey; augment is true or false for them")
        if foreign:
            raise ValueError("; ".join(foreign))
        return self


class ModelConfig(Settings):
    """Which network; as one string its name. None stands for the builder's default."""

    name: str = "vit-tiny"
    """vit-tiny, lm-tiny (causal, for text), timm:NAME or transformers:NAME (a folder, or a model on the hub)."""
    pretrained: bool | None = None
    """Begin with the weights that come with the model; none: transformers' do, all others begin fresh."""
    width: Count | None = None
    """Features of a token."""
    depth: Count | None = None
    """Number of layers."""
    heads: Count | None = None
    """Attention heads; they divide the width."""
    patch: Count | None = None
    """Edge of a patch in pixels, which divides the image; of timm's ResNets the stride of the stem: 4, 2 or 1."""
    mlp_ratio: Positive | None = None
    """Hidden features of the feed-forward part over the width."""
    dropout: BelowOne | None = None
    """Probability that an activation is dropped while training; none: what the model brings, ours none."""
    drop_path: BelowOne | None = None
    """timm: probability that the last block is skipped in training, less for those before (stochastic depth)."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return model_mapping(value)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in MODELS or any(name.startswith(library) and name != library for library in _LIBRARIES):
            return name
        raise ValueError(
            f'no model "{name}" ({", ".join(MODELS)}, timm:NAME or transformers:NAME){nearest(name, MODELS)}'
        )


class OptimConfig(Settings):
    """AdamW and its learning rate over the steps."""

    lr: Positive = 1e-3
    """Learning rate at its peak."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay of matrices, on the dense weights, pruned entries included."""
    betas: Annotated[tuple[BelowOne, BelowOne], BeforeValidator(items)] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: Positive = 1e-8
    """AdamW's guard against division by zero."""
    schedule: Literal["cosine", "constant", "inverse-sqrt"] = "cosine"
    """The learning rate after warm-up."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps over which the learning rate rises."""
    clip: Positive | None = 1.0
    """Largest gradient norm; none: no clipping."""
    loss: Literal["cross-entropy", "bce"] | None = None
    """Of one class among many: cross-entropy, or bce, a question of yes or no for each; none: the task's own."""
    label_smoothing: BelowOne = 0.0
    """Part of the target's probability that is spread evenly over all classes, in training alone."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Judge the run by an exponential average of its weights with this decay, such as 0.999; none: by the last ones."""


class BleuConfig(Settings):
    """How the translations of the test split are made and judged by BLEU, once training is over."""

    sentences: Annotated[int, Field(ge=0)] | None = None
    """Sentences of test that are translated, the first ones; none: all; 0: no BLEU."""
    beam: Count = 1
    """Translations that are followed at a time; 1 is greedy."""
    length: Count | None = None
    """Most tokens of a translation; none: data.context."""

    @model_validator(mode="after")
    def _of_use(self) -> BleuConfig:
        if self.sentences == 0 and (self.beam, self.length) != (1, None):
            raise ValueError("sentences=0 measures no BLEU; leave the other settings out")
        return self
