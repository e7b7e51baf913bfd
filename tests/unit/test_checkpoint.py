"""Checkpoints: everything comes back, nothing foreign gets in, and a save that fails costs nothing."""

from __future__ import annotations

import copy
import json
import re
import resource
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nmflow.sparsifier import Sparsifier
from nmflow.train.checkpoint import Position, State, _meta, load_checkpoint, save_checkpoint
from nmflow.train.config import TrainConfig
from nmflow.train.optim import build_optimizer

STEPS = 20


class Net(nn.Module):
    """A sparse layer, a tied head, a buffer, and a parameter that no loss reaches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 8, bias=False)
        self.again = nn.Linear(width, 8, bias=False)
        self.again.weight = self.head.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = self.norm(self.first(x)).relu()
        return self.head(hidden) + self.again(hidden)


def config_for(recipe="mdgf-linear", **changes):
    return TrainConfig(**{"recipe": recipe, "targets": {"first": "1:4"}, "steps": STEPS, **changes})


def state_for(config, model=None, seed=0):
    torch.manual_seed(seed)
    model = model or Net()
    sparsifier = Sparsifier(
        model, config.resolved_targets(), config.build_recipe(), total_steps=STEPS, mask_every=config.mask_every
    )
    return State(config, model, build_optimizer(model, config.optim), sparsifier)


def train(state, steps):
    """Steps [start, stop) on data that follow from the step."""
    if state.sparsifier.recipe.needs_gradients and state.sparsifier.current_step == 0:
        state.sparsifier.calibrate(lambda model, x: model(x).square().sum(), [torch.ones(4, 8).cumsum(0)])
    for step in steps:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        state.model(x).square().mean().backward()
        state.sparsifier.edit_gradients()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.sparsifier.step(n=step + 1)


def bits(state):
    """Every number of a run, by name, as independent copies."""
    found = {f"model {name}": tensor for name, tensor in state.model.state_dict().items()}
    for place, moments in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {place} {name}": tensor for name, tensor in moments.items()}
    found |= {f"mask {name}": tensor for name, tensor in state.sparsifier.state_dict()["masks"].items()}
    found["effective"] = state.model.first.weight
    found["step"] = torch.tensor(state.sparsifier.current_step)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def saved(tmp_path):
    """(path, state) of a run stopped in the middle of its decay phase."""
    state = state_for(config_for())
    train(state, range(7))
    save_checkpoint(tmp_path / "checkpoint.safetensors", state, Position(7, 123, 4.5))
    return tmp_path / "checkpoint.safetensors", state


# -- everything comes back ---------------------------------------------------------------------------------------

SEQUENCE = [
    {"recipe": "sdgf-stepwise", "until": 0.5, "pattern": "2:4"},
    {"recipe": "mdgf-linear", "until": 1.0, "pattern": None},
]


@pytest.mark.parametrize(
    ("recipe", "mask_every"),
    [
        ("dense", 1), ("ste", 1), ("sr-ste", 1), ("mdgf-linear", 1), ("mdgf-exponential", 3), ("sdgf-stepwise", 1),
        ("sdgf-geometric", 1), ("snip", 1), ("idp", 1), (SEQUENCE, 1),
        ({"name": "sdgf-stepwise", "schedule": [[0.1, "3:4"], [0.6, "1:4"]]}, 2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stopped", [1, 7, STEPS])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, recipe, mask_every, stopped):
    config = config_for(recipe, mask_every=mask_every)
    whole = state_for(config)
    train(whole, range(stopped))
    save_checkpoint(tmp_path / "c", whole, Position(stopped))
    resumed = state_for(config, seed=1)
    assert load_checkpoint(tmp_path / "c", resumed).step == stopped
    assert_same(bits(whole), bits(resumed))
    train(whole, range(stopped, STEPS))
    train(resumed, range(stopped, STEPS))
    assert_same(bits(whole), bits(resumed))


def test_position_comes_back(saved):
    path, _ = saved
    assert load_checkpoint(path, state_for(config_for(), seed=1)) == Position(7, 123, 4.5)


def test_a_checkpoint_of_the_first_step_may_lack_moments(tmp_path):
    state = state_for(config_for())
    save_checkpoint(tmp_path / "c", state, Position(0))
    other = state_for(config_for(), seed=1)
    load_checkpoint(tmp_path / "c", other)
    assert_same(bits(state), bits(other))


def test_the_loss_scaler_comes_back(tmp_path):
    config = config_for()
    state, other = state_for(config), state_for(config)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 2.0)]
    state = State(config, state.model, state.optimizer, state.sparsifier, scalers[0])
    other = State(config, other.model, other.optimizer, other.sparsifier, scalers[1])
    scalers[0].scale(torch.ones(()))
    save_checkpoint(tmp_path / "c", state, Position(0))
    load_checkpoint(tmp_path / "c", other)
    assert scalers[1].state_dict() == scalers[0].state_dict()
    with pytest.raises(ValueError, match="loss scaler"):
        load_checkpoint(tmp_path / "c", state_for(config))


def test_the_folder_of_a_run_may_change(saved):
    path, _ = saved
    load_checkpoint(path, state_for(config_for(out="elsewhere")))


# -- what the file is --------------------------------------------------------------------------------------------


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def test_the_file_is_plain_safetensors(saved):
    """Read by hand: eight bytes of length, JSON, tensors; tied weights once, all else as JSON."""
    path, state = saved
    header = header_of(path)
    meta = json.loads(header.pop("__metadata__")["nmflow"])
    trained = ("first.weight", "first.bias", "norm.weight", "norm.bias", "head.weight")
    buffers = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert set(header) == {
        *(f"model/{name}" for name in (*trained, *buffers, "unused")),
        *(f"optimizer/{name}/{moment}" for name in trained for moment in ("step", "exp_avg", "exp_avg_sq")),
    }
    assert meta["step"] == 7
    assert meta["config"]["targets"] == {"first": "1:4"}
    assert meta["sparsifier"]["recipe"] == state.sparsifier.recipe.to_dict()
    assert torch.equal(load_file(path)["model/first.weight"], state.sparsifier.dense_weight("first.weight"))


def rewritten(path, change):
    """The same checkpoint after `change(tensors, meta)`."""
    tensors, meta = load_file(path), json.loads(header_of(path)["__metadata__"]["nmflow"])
    change(tensors, meta)
    save_file(tensors, path, metadata={"nmflow": json.dumps(meta)})


def test_a_checkpoint_older_than_a_setting(saved):
    """What it does not say is what the setting's default says; anything else is another run."""
    path, _ = saved

    def forget(tensors, meta):
        del meta["config"]["shard"], meta["config"]["bleu"], meta["config"]["optim"]["ema"]

    rewritten(path, forget)
    load_checkpoint(path, state_for(config_for()))
    rewritten(path, lambda tensors, meta: meta["config"].update(yet_unknown=1))
    refused(path, state_for(config_for(), seed=1), "yet_unknown: the checkpoint has 1, this run None")


# -- nothing foreign gets in -------------------------------------------------------------------------------------


def refused(path, state, *words):
    """Loading raises a ValueError with all the words, and the run is what it was."""
    before = bits(state)
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        load_checkpoint(path, state)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)
    assert_same(before, bits(state))


def test_a_file_that_was_cut_short(saved):
    path, _ = saved
    content = path.read_bytes()
    state = state_for(config_for(), seed=1)
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, state, str(path))


def test_foreign_files(tmp_path):
    state = state_for(config_for())
    pickled, text, other, model = (tmp_path / name for name in ("a.pt", "b.json", "c.safetensors", "d.safetensors"))
    torch.save({"step": 1}, pickled)
    text.write_text('{"step": 1}')
    save_file({"x": torch.ones(2)}, other)
    save_file({"x": torch.ones(2)}, model, metadata={"nmflow": json.dumps({"format": "nmflow-dense"})})
    for path in (pickled, text):
        refused(path, state, str(path), "no checkpoint")
    refused(other, state, "not the checkpoint of a run")
    refused(model, state, "nmflow-dense", "not the checkpoint of a run")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing", state)


def test_broken_metadata(saved):
    path, _ = saved
    state = state_for(config_for(), seed=1)
    content = path.read_bytes()
    rewritten(path, lambda tensors, meta: meta.update(version=99))
    refused(path, state, "version 99")
    path.write_bytes(content)
    rewritten(path, lambda tensors, meta: meta.update(step="7"))
    refused(path, state, "step")
    path.write_bytes(content)
    rewritten(path, lambda tensors, meta: meta.pop("sparsifier"))
    refused(path, state, "sparsifier")
    path.write_bytes(content)
    rewritten(path, lambda tensors, meta: meta["sparsifier"].update(step=STEPS + 1))
    refused(path, state, "does not lie in 0..20")


def test_another_configuration(saved):
    path, _ = saved
    config = config_for("sr-ste", optim={"lr": 0.5}, seed=3)
    refused(path, state_for(config), "recipe: the checkpoint has 'mdgf-linear', this run 'sr-ste'", "optim.lr", "seed")


def test_another_recipe_under_the_same_configuration(saved):
    """The sparsifier asks for itself: a state it did not write is refused."""
    path, _ = saved
    config = config_for()
    torch.manual_seed(0)
    model = Net()
    sparsifier = Sparsifier(model, {"first": "2:4"}, "ste", total_steps=STEPS)
    refused(path, State(config, model, build_optimizer(model, config.optim), sparsifier), "recipe", "slots")


class Renamed(Net):
    """The same network, one layer under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = self.norm
        del self.norm

    def forward(self, x):
        hidden = self.norms(self.first(x)).relu()
        return self.head(hidden) + self.again(hidden)


def test_another_model(saved):
    path, _ = saved
    wider = state_for(config_for(), model=Net(width=32))
    refused(path, wider, "first.weight: float32 [16, 8] in the checkpoint, float32 [32, 8] in this model")
    refused(path, state_for(config_for(), model=Net().double()), "float32", "float64")
    renamed = state_for(config_for(), model=Renamed())
    refused(path, renamed, "norms.weight: the checkpoint lacks this tensor; it has norm.weight")


def test_tensors_that_do_not_belong(saved):
    path, _ = saved
    state = state_for(config_for(), seed=1)
    content = path.read_bytes()
    for name, tensor, words in (
        ("optimizer/first.weight/exp_avg", torch.ones(3), "optimizer/first.weight/exp_avg"),
        ("optimizer/nobody.weight/exp_avg", torch.ones(3), "nobody.weight"),
        ("optimizer/first.weight/momentum", torch.ones(16, 8), "momentum"),
        ("optimizer/first.weight/step", torch.ones(2), "expected one number"),
        ("mask/first.weight", torch.ones(3), "first.weight"),
        ("extra/first.weight", torch.ones(3), "extra/first.weight"),
    ):
        path.write_bytes(content)
        rewritten(path, lambda tensors, meta, n=name, t=tensor: tensors.update({n: t}))
        refused(path, state, words)


# -- a save that fails costs nothing -----------------------------------------------------------------------------


@contextmanager
def full_disk(limit: int):
    """No file of this process may grow beyond `limit` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_full_disk_keeps_the_last_checkpoint(saved, limit):
    path, state = saved
    content = path.read_bytes()
    train(state, range(7, 9))
    with full_disk(limit), pytest.raises(OSError, match=r"checkpoint|File too large"):
        save_checkpoint(path, state, Position(9))
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    save_checkpoint(path, state, Position(9))
    assert load_checkpoint(path, state_for(config_for())).step == 9


def test_a_model_whose_state_is_no_tensor(tmp_path):
    class Talkative(Net):
        def get_extra_state(self):
            return {"note": "hello"}

        def set_extra_state(self, state):
            pass

    state = state_for(config_for(), model=Talkative())
    with pytest.raises(ValueError, match="_extra_state"):
        save_checkpoint(tmp_path / "c", state, Position(0))
    assert not list(tmp_path.iterdir())


def test_saving_changes_nothing(saved, tmp_path):
    _, state = saved
    before = copy.deepcopy(bits(state))
    save_checkpoint(tmp_path / "second", state, Position(7))
    assert_same(before, bits(state))


def test_metadata_nested_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"last: its metadata are no JSON"):
        _meta(Path("last"), "[" * 100_000)
