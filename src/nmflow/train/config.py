"""What a run is told: every setting, its default and its limits, and how a file and arguments become one.

Nothing here imports torch, so that a wrong setting is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from nmflow.train.config_errors import describe
from nmflow.train.config_fields import (
    Count,
    Patterns,
    PatternText,
    Recipes,
    RecipeValue,
    Seed,
    Seeds,
    Settings,
    build_recipe,
)
from nmflow.train.config_sections import BleuConfig, DataConfig, ModelConfig, OptimConfig, data_mapping, model_mapping
from nmflow.train.config_text import dump_values, read_source

if TYPE_CHECKING:
    from nmflow.schedules import Recipe


class RunConfig(Settings):
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
    """Mixed precision of the forward pass; on CPUs attention over short sequences stays float32, which is quicker."""
    shard: bool = False
    """Spread weights, gradients and optimizer state over the processes (FSDP2), instead of a copy for each (DDP)."""
    eval_every: Count = 50
    """Steps between two looks at the validation split."""
    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    probe_every: Count | None = None
    """Steps between two looks at gradient noise; none: never."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    out: str | None = None
    """Run folder; none: a new one under runs/."""

    @field_validator("probe_every")
    @classmethod
    def _looks_once(cls, every: int | None, info: ValidationInfo) -> int | None:
        steps: int | None = info.data.get("steps")  # none where it has a problem of its own
        if every is not None and steps is not None and every > steps:
            raise ValueError(f"{every} is more than the {steps} steps of the run, so nothing would be looked at")
        return every

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

    recipes: Recipes = (
        "dense", "sr-ste", "mdgf-exponential", "sdgf-stepwise",
    )
    """Recipes to compare: names, mappings or lists of parts."""
    pattern: Patterns | None = ("1:16",)
    """Patterns N:M (N kept) of the feed-forward layers; in place of `targets`."""
    targets: dict[str, PatternText | None] | None = Field(default=None, validate_default=True)
    """Patterns by role or name, one set for all runs; null keeps a layer dense."""
    seeds: Seeds = (0, 1, 2)
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
    return model_mapping(TrainConfig.model_fields["recipe"].default if value is None else value)


_SHORTHAND = {"data": data_mapping, "model": model_mapping, "recipe": _recipe_mapping}


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
