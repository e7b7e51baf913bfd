"""What a run is told: every setting, its default and its limits, and how a file and arguments become one.

Nothing here imports torch, so that a wrong setting is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nmflow.pattern import Pattern
from nmflow.train.config_errors import describe, nearest
from nmflow.train.config_policy import check_policy
from nmflow.train.config_text import dump_values, parse_value, read_source

if TYPE_CHECKING:
    from nmflow.schedules import Recipe

MODELS = ("vit-tiny", "lm-tiny")
"""Models of our own; `timm:NAME` builds any of timm's, `transformers:NAME` any of transformers'."""

_LIBRARIES = ("timm:", "transformers:")

MAX_SEEDS = 1000
"""Runs of one recipe in a comparison."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _items(value: Any) -> Any:
    """`a,b` and a single value as the tuple they stand for; a list as a tuple."""
    if isinstance(value, str):
        return tuple(parse_value(part) for part in value.split(","))
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float | dict) else value


def _seed_items(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_SEEDS:
            raise ValueError(f"{value} is no count from 1 to {MAX_SEEDS}; a single seed is a list: [{value}]")
        return tuple(range(value))
    return _items(value)


def _pattern_text(value: Any) -> str | None:
    """The one spelling of a pattern."""
    try:
        return None if value is None else str(Pattern.parse(value))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _recipe_value(value: Any) -> Any:
    """Plain data (lists, not tuples) that builds a recipe."""
    value = _plain(value)
    try:
        build_recipe(value)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Pattern):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{value!r} is no plain value (text, numbers, lists and mappings of them)")


def _augment_value(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_policy(value)
    raise ValueError(f"expected true, false or a policy of timm such as rand-m9-mstd0.5, found {value!r}")


PatternText = Annotated[str, BeforeValidator(_pattern_text)]
RecipeValue = Annotated[Any, BeforeValidator(_recipe_value)]
Patterns = Annotated[tuple[PatternText, ...], BeforeValidator(_items), Field(min_length=1)]


def build_recipe(value: str | dict[str, Any] | list[Any]) -> Recipe:
    """A recipe from its name, from `{name: ..., option: ...}`, or from a list of the parts of a sequence.

    Raises `ValueError` or `TypeError` as `nmflow.recipe` and `nmflow.sequence` do.
    """
    from nmflow.schedules import Recipe, recipe, sequence

    if isinstance(value, str):
        return recipe(value)
    if isinstance(value, dict):
        return Recipe.from_dict(value)
    if isinstance(value, list):
        return sequence(*value)
    raise ValueError(f"a recipe is a name, a mapping with a name, or a list of parts, not {value!r}")


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


def _data_mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name, colon, path = value.partition(":")
    return {"name": name, "path": path} if colon else {"name": name}


def _model_mapping(value: Any) -> Any:
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
}


class DataConfig(_Settings):
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

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _data_mapping(value)

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


class ModelConfig(_Settings):
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
    """Edge of a patch in pixels; it divides the image."""
    mlp_ratio: Positive | None = None
    """Hidden features of the feed-forward part over the width."""
    dropout: BelowOne | None = None
    """Probability that an activation is dropped while training; none: what the model brings, ours none."""
    drop_path: BelowOne | None = None
    """timm: probability that the last block is skipped in training, less for those before (stochastic depth)."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _model_mapping(value)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in MODELS or any(name.startswith(library) and name != library for library in _LIBRARIES):
            return name
        raise ValueError(
            f'no model "{name}" ({", ".join(MODELS)}, timm:NAME or transformers:NAME){nearest(name, MODELS)}'
        )


class OptimConfig(_Settings):
    """AdamW and its learning rate over the steps."""

    lr: Positive = 1e-3
    """Learning rate at its peak."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay of matrices, on the dense weights, pruned entries included."""
    betas: Annotated[tuple[BelowOne, BelowOne], BeforeValidator(_items)] = (0.9, 0.999)
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


class BleuConfig(_Settings):
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


class RunConfig(_Settings):
    """What a single run and a comparison have in common."""

    data: DataConfig = DataConfig()
    """The data: digits, cifar10:PATH, images:PATH, text:PATH, glue:PATH, translation:PATH, or a mapping."""
    model: ModelConfig = ModelConfig()
    """The network: vit-tiny, lm-tiny, timm:NAME, transformers:NAME, or a mapping."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    bleu: BleuConfig = BleuConfig()
    """Translation: how BLEU is measured."""
    remainder: Literal["error", "partial", "skip"] = "error"
    """A last block shorter than M: refuse, keep min(N, r) of it, or leave the layer dense."""
    mask_every: Count = 1
    """Optimizer steps between two masks."""
    steps: Count = 200
    """Optimizer steps of the run."""
    batch: Count = 64
    """Items of one optimizer step, over all processes and micro-batches."""
    accumulate: Count = 1
    """Micro-batches of one optimizer step."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward pass."""
    shard: bool = False
    """Spread weights, gradients and optimizer state over the processes (FSDP2), instead of a copy for each (DDP)."""
    eval_every: Count = 50
    """Steps between two looks at the validation split."""
    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    out: str | None = None
    """Run folder; none: a new one under runs/."""

    @field_validator("shard")
    @classmethod
    def _can_be_spread(cls, shard: bool, info: ValidationInfo) -> bool:
        if shard and info.data.get("precision") == "fp16":
            raise ValueError("a loss scale (precision=fp16) over spread gradients is not supported; use bf16")
        if shard and getattr(info.data.get("optim"), "ema", None) is not None:
            raise ValueError("an average (optim.ema) of spread weights is not supported; leave one of them out")
        return shard

    @field_validator("bleu")
    @classmethod
    def _translates(cls, bleu: BleuConfig, info: ValidationInfo) -> BleuConfig:
        data = info.data.get("data")  # none where it has a problem of its own
        if data is not None and data.name != "translation" and bleu != BleuConfig():
            raise ValueError(f"of no use to {data.name} (it is for translation); leave it out")
        return bleu

    @field_validator("accumulate")
    @classmethod
    def _divides_batch(cls, accumulate: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch", accumulate)
        if batch % accumulate:
            raise ValueError(f"{accumulate} micro-batches do not divide a batch of {batch}")
        return accumulate

    def tokenizer(self) -> str | None:
        """Where the tokenizer of the run's text lies: named, or beside a model of transformers."""
        named, model = self.data.tokenizer, self.model.name
        takes_one = self.data.name == "glue" or (self.data.name == "text" and self.model.pretrained is not False)
        has_one = model.startswith("transformers:") and takes_one
        return named or (model.removeprefix("transformers:") if has_one else None)

    def to_yaml(self) -> str:
        """Every field as YAML; `load_config` (`load_compare_config`) reads it back to an equal value."""
        return dump_values(self.model_dump())


class TrainConfig(RunConfig):
    """One run, and unless `baseline` is off a dense run of the same budget beside it.

    >>> config = TrainConfig(data="digits", recipe={"name": "mdgf-linear", "dense": 0.1})
    >>> config.resolved_targets()
    {'ff': '1:16'}
    """

    pattern: PatternText | None = "1:16"
    """Pattern N:M (N kept) of the feed-forward layers; in place of `targets`."""
    targets: dict[str, PatternText | None] | None = Field(default=None, validate_default=True)
    """Patterns by role or name, such as {ff: 1:8, qkv: 1:4}; null keeps a layer dense."""
    recipe: RecipeValue = "mdgf-exponential"
    """How sparsity comes about: a name, {name: ..., option: ...}, or a list of parts in sequence."""
    seed: Seed = 0
    """Seed of weights, data order, augmentation and dropout."""
    baseline: bool = True
    """Train the same network densely as well, to compare with."""

    @model_validator(mode="before")
    @classmethod
    def _targets_replace_pattern(cls, value: Any) -> Any:
        return _without_default_pattern(value)

    @field_validator("targets")
    @classmethod
    def _one_of_both(cls, targets: dict[str, str | None] | None, info: ValidationInfo) -> Any:
        return _check_targets(targets, info)

    def resolved_targets(self) -> dict[str, str | None]:
        """The rules that `nmflow.Sparsifier` takes as targets; `pattern` alone means the role ff."""
        return dict(self.targets) if self.targets is not None else {"ff": self.pattern}

    def build_recipe(self) -> Recipe:
        """The recipe as an object."""
        return build_recipe(self.recipe)

    def stored(self) -> dict[str, Any]:
        """As checkpoints and results have it: plain data, without the folder, for a run may be moved."""
        return self.model_dump(mode="json", exclude={"out"})


def as_stored_now(found: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the defaults of settings that are younger than it is, so that it can be compared.

    One that cannot be read any more is given back as it is: then the differences say why.
    """
    try:
        return TrainConfig.model_validate(found).stored()
    except ValidationError:
        return found


class CompareConfig(RunConfig):
    """Recipes x patterns x seeds, each a run like any other, in one table.

    >>> config = CompareConfig(recipes="dense,ste", pattern="1:8,1:16", seeds=2)
    >>> config.recipes, config.pattern, config.seeds
    (('dense', 'ste'), ('1:8', '1:16'), (0, 1))
    """

    recipes: Annotated[tuple[RecipeValue, ...], BeforeValidator(_items), Field(min_length=1)] = (
        "dense", "sr-ste", "mdgf-exponential", "sdgf-stepwise",
    )
    """Recipes to compare: names, mappings or lists of parts."""
    pattern: Patterns | None = ("1:16",)
    """Patterns N:M (N kept) of the feed-forward layers; in place of `targets`."""
    targets: dict[str, PatternText | None] | None = Field(default=None, validate_default=True)
    """Patterns by role or name, one set for all runs; null keeps a layer dense."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_seed_items), Field(min_length=1)] = (0, 1, 2)
    """Seeds: a list, or a count n for 0 to n - 1."""

    @model_validator(mode="before")
    @classmethod
    def _targets_replace_pattern(cls, value: Any) -> Any:
        return _without_default_pattern(value)

    @field_validator("targets")
    @classmethod
    def _one_of_both(cls, targets: dict[str, str | None] | None, info: ValidationInfo) -> Any:
        return _check_targets(targets, info)

    @field_validator("recipes", "pattern", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...] | None) -> Any:
        twice = [value for i, value in enumerate(values or ()) if value in (values or ())[:i]]
        if twice:
            raise ValueError(f"{twice[0]} stands twice")
        return values

    def single(self, recipe: Any, pattern: str | None, seed: int) -> TrainConfig:
        """The run of one cell; `pattern` is one of `self.pattern`, None where `targets` rule."""
        shared = {name: getattr(self, name) for name in RunConfig.model_fields}
        return TrainConfig(
            **shared, pattern=pattern, targets=self.targets, recipe=recipe, seed=seed, baseline=False
        )


_Config = TypeVar("_Config", bound=RunConfig)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a run: the defaults, then a YAML file, then `key=value` arguments.

    A dot enters a section (`optim.lr=3e-4`, `targets.ff=1:8`, `recipe.beta=1e-4`); a section given whole
    replaces the file's. Raises `FileNotFoundError`, and one `ValueError` that names every problem with its
    key, where it stands and what is allowed.

    >>> load_config(None, ["steps=100", "targets.ff=1:8", "data=text:book.txt"]).targets
    {'ff': '1:8'}
    >>> load_config(None, ["step=100"])
    Traceback (most recent call last):
    ValueError: step: no such key; did you mean "steps"? (argument "step=100")
    """
    return _load(TrainConfig, path, overrides)


def load_compare_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> CompareConfig:
    """The configuration of a comparison, read as `load_config` reads a run's.

    >>> load_compare_config(None, ["recipes=dense,sr-ste", "pattern=1:8,1:16", "seeds=3"]).seeds
    (0, 1, 2)
    """
    return _load(CompareConfig, path, overrides)


def _load(kind: type[_Config], path: str | Path | None, overrides: Sequence[str]) -> _Config:
    source = read_source(path, overrides, _SHORTHAND, whole_keys=frozenset({"targets"}))
    problems = list(source.problems)
    config: _Config | None = None
    try:
        config = kind.model_validate(source.values)
    except ValidationError as error:
        problems += describe(error, kind, source)
    if config is None or problems:
        head = f"{len(problems)} problems in the configuration:\n  " if len(problems) > 1 else ""
        raise ValueError(head + "\n  ".join(problems))
    return config


def _recipe_mapping(value: Any) -> Any:
    """`recipe.beta=1e-4` alone refines the default recipe."""
    return _model_mapping(TrainConfig.model_fields["recipe"].default if value is None else value)


_SHORTHAND = {"data": _data_mapping, "model": _model_mapping, "recipe": _recipe_mapping}


def _without_default_pattern(value: Any) -> Any:
    if isinstance(value, dict) and value.get("targets") is not None and "pattern" not in value:
        return {**value, "pattern": None}
    return value


def _check_targets(targets: dict[str, str | None] | None, info: ValidationInfo) -> Any:
    if "pattern" not in info.data:  # the pattern has a problem of its own
        return targets
    pattern = info.data["pattern"]
    if targets is not None and pattern is not None:
        raise ValueError(
            f"pattern ({pattern}) and targets are both given; pattern alone means {{ff: pattern}}: "
            "move it into targets, or set one of the two to null"
        )
    if not targets and pattern is None:
        raise ValueError("neither pattern nor targets is given; a dense run is recipe=dense")
    return targets
