"""Configurations: what text means, what wins over what, what is refused and how it is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from nmflow.masks import REMAINDERS
from nmflow.models import BUILDERS
from nmflow.train.config import CompareConfig, TrainConfig, load_compare_config, load_config
from nmflow.train.config_errors import known_keys
from nmflow.train.config_fields import build_recipe
from nmflow.train.config_help import settings_lines
from nmflow.train.config_sections import MODELS, DataConfig, ModelConfig, OptimConfig
from nmflow.train.config_text import MAX_BYTES, dump_values, parse_value
from nmflow.train.data import LOADERS


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------------------------------------ scalars
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:16", "1:16"),
        ("2:4", "2:4"),
        ("1:59", "1:59"),
        ("1e-3", 0.001),
        ("3E4", 30000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("1.", 1.0),
        ("010", 10),
        ("0", 0),
        ("+7", 7),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("nan", "nan"),
        ("'12'", "12"),
        ("dense,sr-ste", "dense,sr-ste"),
        ("{ff: 1:8, qk: null}", {"ff": "1:8", "qk": None}),
        ("[1:8, 1e-3, no]", ["1:8", 0.001, "no"]),
    ],
)
def test_a_scalar_means_what_yaml_12_says(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_the_trap_is_real():
    assert yaml.safe_load("[1:16, no, 010]") == [76, False, 8]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3", 'the key "a" stands twice (line 3, column 1)'),
        ("a: {b: 1, b: 1}", 'the key "b" stands twice (line 1'),
        ("a: &x [1]\nb: *x", "no aliases"),
        ("a: &x [*x]", "no aliases"),
        ("a: [1", "line 1"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!int abc", "invalid literal"),
        ("? [1]\n: 2", "cannot be a key"),
        ("[" * 5000, "recursion"),
    ],
)
def test_broken_yaml_is_told_with_its_place(text, place):
    with pytest.raises(ValueError, match=re.escape(place)):
        parse_value(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=8), plain, max_size=4))
def test_dumped_values_come_back_equal(values):
    assert parse_value(dump_values(values)) == values


@given(st.dictionaries(st.sampled_from("abc"), st.from_regex(r"[1-9]:[1-9][0-9]?", fullmatch=True)))
def test_patterns_survive_a_yaml_11_reader(values):
    assert (yaml.safe_load(dump_values(values)) or {}) == values


# --------------------------------------------------------------------------------------- what a config is
def test_the_embedded_default():
    config = load_config(None, [])
    assert config == TrainConfig()
    assert (config.data.name, config.model.name, config.recipe) == ("digits", "vit-tiny", "mdgf-exponential")
    assert config.resolved_targets() == {"ff": "1:16"}
    assert config.baseline


@pytest.mark.parametrize("kind", [DataConfig, ModelConfig, OptimConfig, TrainConfig, CompareConfig])
def test_every_field_has_one_line_that_describes_it_and_nothing_moves(kind: type[BaseModel]):
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description, name
        assert field.description.endswith("."), name
    config = kind()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(kind.model_fields)), None)


def test_names_agree_with_the_rooms_they_name():
    names = DataConfig.model_json_schema()["properties"]["name"]["enum"]
    assert names == list(LOADERS)
    assert list(MODELS) == list(BUILDERS)
    assert tuple(TrainConfig.model_json_schema()["properties"]["remainder"]["enum"]) == REMAINDERS


def test_reading_a_config_does_not_import_torch():
    code = (
        "import sys; from nmflow.train.config import load_config\n"
        "load_config(None, ['recipe.dense=0.1', 'steps=7'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data=digits", {"name": "digits"}),
        ("data=cifar10:/some/where", {"name": "cifar10", "path": "/some/where"}),
        ("data=text:C:\\book.txt", {"name": "text", "path": "C:\\book.txt"}),
        ("data={name: images, path: p, image_size: 64}", {"name": "images", "path": "p", "image_size": 64}),
    ],
)
def test_data_in_short(text, expected):
    assert load_config(None, [text]).data == DataConfig(**expected)


def test_a_model_in_short():
    assert load_config(None, ["model=timm:resnet18"]).model == ModelConfig(name="timm:resnet18")


# ------------------------------------------------------------------------------------- what wins over what
def test_arguments_win_over_the_file_and_the_file_over_the_defaults(write):
    path = write("steps: 10\nbatch: 8\noptim:\n  lr: 0.5\n  eps: 1e-6\npattern: 1:8\n")
    config = load_config(path, ["steps=20", "optim.lr=1e-4"])
    assert (config.steps, config.batch, config.pattern) == (20, 8, "1:8")
    assert (config.optim.lr, config.optim.eps, config.optim.clip) == (1e-4, 1e-6, 1.0)


def test_a_section_given_whole_replaces_the_files(write):
    path = write("data: {name: text, path: book.txt, context: 16}")
    assert load_config(path, ["data=digits"]).data == DataConfig()
    assert load_config(path, ["data.context=8"]).data == DataConfig(name="text", path="book.txt", context=8)


@pytest.mark.parametrize("swap", [False, True])
def test_a_part_refines_the_whole_in_whatever_order(swap):
    arguments = ["data=cifar10:here", "data.augment=false"]
    config = load_config(None, arguments[::-1] if swap else arguments)
    assert config.data == DataConfig(name="cifar10", path="here", augment=False)


def test_parts_of_a_recipe_refine_its_name(write):
    path = write("recipe: mdgf-linear")
    assert load_config(path, ["recipe.dense=0.1"]).recipe == {"name": "mdgf-linear", "dense": 0.1}
    assert load_config(None, ["recipe.floor=1e-2"]).recipe == {"name": "mdgf-exponential", "floor": 0.01}


def test_dots_in_a_targets_name_are_part_of_it():
    config = load_config(None, ["targets.encoder.layers.0.linear1.weight=1:8", "targets.ff=null"])
    assert config.resolved_targets() == {"encoder.layers.0.linear1.weight": "1:8", "ff": None}
    assert config.pattern is None


def test_resolved_targets_are_the_callers_own():
    config = TrainConfig(targets={"ff": "1:4"})
    config.resolved_targets()["qkv"] = "1:4"
    assert config.targets == {"ff": "1:4"}


def test_a_saved_config_can_be_given_targets(write):
    path = write(TrainConfig().to_yaml())
    assert load_config(path, ["pattern=null", "targets.ff=1:8"]).resolved_targets() == {"ff": "1:8"}


@pytest.mark.parametrize(
    ("arguments", "recipes", "pattern", "seeds"),
    [
        (["recipes=dense,ste", "pattern=1:8, 1:16", "seeds=2"], ("dense", "ste"), ("1:8", "1:16"), (0, 1)),
        (["recipes=ste", "pattern=2:4", "seeds=0,7"], ("ste",), ("2:4",), (0, 7)),
        (["recipes=[ste, {name: ste, dense: 0.5}]", "pattern=[2:4]", "seeds=[5]"],
         ("ste", {"name": "ste", "dense": 0.5}), ("2:4",), (5,)),
    ],
)
def test_lists_of_a_comparison(arguments, recipes, pattern, seeds):
    config = load_compare_config(None, arguments)
    assert (config.recipes, config.pattern, config.seeds) == (recipes, pattern, seeds)


def test_a_cell_of_a_comparison_is_an_ordinary_run():
    config = load_compare_config(None, ["steps=40", "data.augment=true", "out=here"])
    single = config.single("ste", "1:8", 5)
    assert single == TrainConfig(
        steps=40, data=DataConfig(augment=True), out="here", recipe="ste", pattern="1:8", seed=5, baseline=False
    )
    ruled = CompareConfig(targets={"ff": "1:8", "qk": "2:4"})
    assert ruled.pattern is None
    assert ruled.single("ste", None, 0).resolved_targets() == {"ff": "1:8", "qk": "2:4"}


# ------------------------------------------------------------------------------------------------ recipes
def test_a_recipe_is_a_name_a_mapping_or_a_list():
    assert str(build_recipe("ste").at(0, 10, "1:8").pattern) == "1:8"
    half = build_recipe({"name": "mdgf-linear", "dense": 0.0, "decay_end": 0.5})
    assert [half.at(step, 8, "1:8").decay for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    then = build_recipe([{"recipe": {"name": "ste", "dense": 0.0}, "until": 0.5, "pattern": "4:8"},
                         {"recipe": "ste", "until": 1.0}])
    assert [str(then.at(step, 4, "1:8").pattern) for step in range(4)] == ["4:8", "4:8", "1:8", "1:8"]


def test_what_a_recipe_writes_of_itself_is_a_configuration():
    for value in ("mdgf-exponential", [["ste", 0.5, "4:8"], ["mdgf-linear", 1.0]]):
        recipe = build_recipe(value)
        assert TrainConfig(recipe=recipe.to_dict()).build_recipe() == recipe


# ------------------------------------------------------------------------------------------ the round trip
positive = st.floats(min_value=1e-12, max_value=1e12)
configs = st.builds(
    TrainConfig,
    data=st.sampled_from(
        [DataConfig(), DataConfig(augment=True), DataConfig(name="images", path="p", augment="3a", erase=0.25),
         DataConfig(name="text", path="1:16", context=7),
         DataConfig(name="cifar10", path="a path: with #, \"quotes\" and ü")]
    ),
    model=st.builds(ModelConfig, width=st.none() | st.integers(1, 999), mlp_ratio=st.none() | positive),
    optim=st.builds(
        OptimConfig, lr=positive, clip=st.none() | positive, betas=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
        ema=st.none() | st.floats(0.1, 0.9999), loss=st.sampled_from([None, "bce"]),
    ),
    pattern=st.sampled_from(["1:16", "2:4", "1:128", "dense"]),
    recipe=st.sampled_from(
        ["sr-ste", {"name": "mdgf-linear", "beta": 1e-4}, [["ste", 0.5, "4:8"], ["ste", 1.0]],
         {"name": "ste", "schedule": [[0.25, "2:4"], [0.5, "1:4"]]}]
    ),
    precision=st.sampled_from(["no", "bf16", "fp16"]),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 10**9),
    out=st.none() | st.text(min_size=1),
    tensorboard=st.booleans(),
)


@given(config=configs)
def test_a_written_config_is_read_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path, []) == config
    written = yaml.safe_load(config.to_yaml())
    assert set(written) == set(TrainConfig.model_fields)
    assert written["pattern"] == config.pattern


@pytest.mark.parametrize("targets", [None, {"ff": "1:8", "re:.*out_proj.*": "2:4", "head": None}])
def test_a_written_comparison_is_read_back_equal(write, targets):
    config = CompareConfig(recipes=("dense", {"name": "ste", "dense": 0.1}), seeds=[3, 1], targets=targets)
    assert load_compare_config(write(config.to_yaml()), []) == config


# --------------------------------------------------------------------------------------- what is refused
BAD = [
    ("step=3", 'step: no such key; did you mean "steps"? (argument "step=3")'),
    ("lr=3", 'lr: no such key; did you mean "optim.lr"? (argument "lr=3")'),
    ("optim.lrr=3", 'optim.lrr: no such key; did you mean "optim.lr"? (argument "optim.lrr=3")'),
    ("optm.lr=3", 'optm: no such key; did you mean "optim"? (argument "optm.lr=3")'),
    ("heads=3", 'heads: no such key; did you mean "model.heads"? (argument "heads=3")'),
    ("eps=3", 'eps: no such key; did you mean "optim.eps"?'),
    ("qqqq=3", 'qqqq: no such key (argument "qqqq=3")'),
    ("steps=ten", "steps: expected a whole number, found 'ten' (argument \"steps=ten\")"),
    ("steps=1e3", "steps: expected a whole number, found 1000.0"),
    ("steps=true", "steps: expected a whole number, found True"),
    ("steps=", "steps: expected a whole number, found None"),
    ("steps=0", "steps: expected a value >= 1, found 0"),
    ("steps.x=1", "steps: expected a whole number, found {'x': 1}"),
    ("seed=-1", "seed: expected a value >= 0, found -1"),
    ("seed=4294967296", "seed: expected a value < 4294967296"),
    ("out=12", "out: expected text (in quotes, if it looks like a number), found 12"),
    ("baseline=no", "baseline: expected true or false, found 'no'"),
    ("optim.lr=0", "optim.lr: expected a value > 0, found 0"),
    ("optim.lr=1e999", "optim.lr: expected a finite number"),
    ("optim.warmup=1.5", "optim.warmup: expected a value <= 1, found 1.5"),
    ("optim.betas=0.9", "optim.betas"),
    ("optim.betas=0.9,1", "optim.betas.1: expected a value < 1, found 1"),
    ("optim.ema=1", "optim.ema: expected a value < 1, found 1"),
    ("optim.ema=0", "optim.ema: expected a value > 0, found 0"),
    ("optim.loss=bse", "optim.loss: expected one of 'cross-entropy' or 'bce', found 'bse'"),
    ("optim=adam", "optim: expected a mapping, found 'adam'"),
    ("model.dropout=1", "model.dropout: expected a value < 1, found 1"),
    ("precision=bf8", "precision: expected one of 'no', 'bf16' or 'fp16', found 'bf8'; did you mean \"bf16\"?"),
    ("remainder=pad", "remainder: expected one of 'error', 'partial' or 'skip'"),
    ("data=digit", "data.name: expected one of 'digits', 'cifar10', 'images', 'text', 'glue' or 'translation', "),
    ("data=cifar10", "data: cifar10 needs a path: data=cifar10:PATH"),
    ("data=digits:here", "data: path is of no use to digits"),
    ("data.context=9", "data: context is of no use to digits (it is for text, glue, translation)"),
    ("data.like_lengths=true", "data: like_lengths is of no use to digits (it is for glue, translation)"),
    ("bleu.beam=4", "bleu: of no use to digits (it is for translation); leave it out"),
    ("bleu={sentences: 0, beam: 2}", "bleu: sentences=0 measures no BLEU; leave the other settings out"),
    ("bleu.sentences=-1", "bleu.sentences: expected a value >= 0, found -1"),
    ("data=3", "data: expected a mapping, found 3"),
    ("model=vit-tny", 'model.name: no model "vit-tny" (vit-tiny, lm-tiny, timm:NAME or transformers:NAME); did'),
    ("model='timm:'", 'model.name: no model "timm:"'),
    ("pattern=16:1", 'pattern: pattern "16:1": N is the number kept of every M'),
    ("pattern=0:4", 'pattern: pattern "0:4"'),
    ("pattern=1:0", 'pattern: pattern "1:0"'),
    ("pattern=a:b", 'pattern: pattern "a:b": expected N:M'),
    ("pattern=16", "pattern: a pattern is a string such as"),
    ("pattern=null", "targets: neither pattern nor targets is given"),
    ("targets.ff=4:2", 'targets.ff: pattern "4:2"'),
    ("targets={}", "targets: neither pattern nor targets is given"),
    ("targets=[ff]", "targets: expected a mapping"),
    ("recipe=mdgf", 'recipe: unknown recipe "mdgf"; did you mean "mdgf-linear"?'),
    ("recipe.name=ste2", 'recipe: unknown recipe "ste2"; did you mean "ste"?'),
    ("recipe.bta=1", 'recipe: recipe mdgf-exponential: no option "bta"; did you mean "beta"?'),
    ("recipe={dense: 0.1}", 'recipe: a recipe needs a "name"'),
    ("recipe=[ste]", "recipe: recipe sequence: part 1"),
    ("recipe=3", "recipe: a recipe is a name, a mapping with a name, or a list of parts, not 3"),
    ("accumulate=3", "accumulate: 3 micro-batches do not divide a batch of 64"),
    ("steps", 'argument "steps": expected key=value'),
    ("=3", 'argument "=3": expected key=value'),
    ("steps=[3", 'argument "steps=[3": the value is no valid YAML'),
]


@pytest.mark.parametrize(("argument", "told"), BAD, ids=[argument for argument, _ in BAD])
def test_a_bad_argument_is_told(argument, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_config(None, [argument])
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("kind", [TrainConfig, CompareConfig])
def test_every_setting_is_listed_with_its_meaning(kind):
    lines = list(settings_lines(kind))
    listed = [line.partition("=")[0] for line in lines[::2]]
    keys = known_keys(kind)
    assert listed == [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert all(len(meaning) > 10 and meaning != "    None" for meaning in lines[1::2])


def test_a_value_made_by_several_arguments_names_them_all():
    with pytest.raises(ValueError, match='no option "foo"') as caught:
        load_config(None, ["recipe.dense=0.1", "steps=9", "recipe.foo=1"])
    assert str(caught.value).endswith('(arguments "recipe.dense=0.1" and "recipe.foo=1")')


def test_all_problems_are_told_at_once_each_with_its_place(write):
    path = write("stps: 3\noptim: {lr: fast}\nbatch: 64\n")
    with pytest.raises(ValueError, match=r"^6 problems") as caught:
        load_config(path, ["steps", "seed=-1", "model=vit", "targets.ff=16:1"])
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        '  argument "steps": expected key=value, such as steps=300 or optim.lr=3e-4',
        '  model.name: no model "vit" (vit-tiny, lm-tiny, timm:NAME or transformers:NAME); did you mean "vit-tiny"? '
        '(argument "model=vit")',
        f"  optim.lr: expected a number, found 'fast' ({path})",
        '  targets.ff: pattern "16:1": N is the number kept of every M, so 1 <= N <= M; did you mean "1:16"? '
        '(argument "targets.ff=16:1")',
        '  seed: expected a value >= 0, found -1 (argument "seed=-1")',
        f'  stps: no such key; did you mean "steps"? ({path})',
    ]


@pytest.mark.parametrize(
    "arguments",
    [["steps=3", "steps=3"], ["optim.lr=1", "optim.lr=2"], ["data=cifar10:a", "data.path=b"],
     ["data.path=b", "data=cifar10:a"], ["optim.lr=1", "optim={lr: 2}"], ["targets.ff=1:8", "targets={ff: 1:4}"]],
)
def test_nothing_is_set_twice(arguments):
    with pytest.raises(ValueError, match="set twice, by ") as caught:
        load_config(None, arguments)
    assert all(argument in str(caught.value) for argument in arguments)


def test_pattern_and_targets_exclude_each_other(write):
    for path, arguments in (
        (None, ["pattern=1:8", "targets.ff=1:4"]),
        (write("targets: {ff: 1:4}"), ["pattern=1:8"]),
    ):
        with pytest.raises(ValueError, match="pattern \\(1:8\\) and targets are both given"):
            load_config(path, arguments)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("heads=3", 'heads: no such key; did you mean "model.heads"?'),
        ("recipe=ste", 'recipe: no such key; did you mean "recipes"?'),
        ("seeds=0", "seeds: 0 is no count from 1 to 1000; a single seed is a list: [0]"),
        ("seeds=1000000000000", "is no count from 1 to 1000"),
        ("seeds=1,1", "seeds: 1 stands twice"),
        ("recipes=dense,dense", "recipes: dense stands twice"),
        ("recipes=dense,foo", 'recipes.1: unknown recipe "foo"'),
        ("recipes=[]", "recipes: expected at least 1 of them"),
        ("pattern=1:8,8:1", 'pattern.1: pattern "8:1"'),
        ("seeds=x", "seeds.0: expected a whole number, found 'x'"),
    ],
)
def test_a_bad_comparison_is_told(argument, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        load_compare_config(None, [argument])


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"- 1\n- 2", "expected a mapping"), (b"steps: [", "no valid YAML"), (b"\xff\xfe\x00", "no valid YAML"),
     (b"#" * (MAX_BYTES + 1), "at most"), (b"steps: 1\nsteps: 2", 'the key "steps" stands twice (line 2, column 1)'),
     (b"1: 2", "expected a key that is text")],
)
def test_a_bad_file_is_told_by_its_name(tmp_path, content, told):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_config(path, [])
    assert str(path) in str(caught.value)


def test_an_empty_file_says_nothing_and_a_missing_one_is_an_error(write, tmp_path):
    assert load_config(write(""), []) == TrainConfig()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml", [])
