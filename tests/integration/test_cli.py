"""The command line: what it answers, where it prints, how it exits, and what it takes its time for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nmflow.cli import cli
from nmflow.schedules import recipe, recipes

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "rich")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def shell(*arguments: str, prefix: str = "") -> subprocess.CompletedProcess[str]:
    """The real thing in a process of its own; `prefix` is Python code that runs before it."""
    code = f"{prefix}\nimport sys; sys.argv = ['nmflow', *{list(arguments)!r}]\nfrom nmflow.cli import main\nmain()"
    command = [sys.executable, "-m", "nmflow", *arguments] if not prefix else [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


WITHOUT_HEAVY = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise SystemExit(f"{{name}} was imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--help",), 0, "N weights kept of every M"),
        (("--version",), 0, "nmflow, version"),
        (("train", "--help"), 0, "resume=DIR"),
        ((), 2, "Commands:"),
        (("scedule", "ste", "1:4"), 2, 'did you mean "schedule"?'),
        (("frobnicate",), 2, "doctor, flops, generate, memory, report, reproduce, schedule, targets, train, verify"),
        (("schedule",), 2, "Missing argument"),
        (("schedule", "mdgf-linaer", "1:8"), 2, 'did you mean "mdgf-linear"'),
        (("schedule", "ste", "8:1"), 2, 'did you mean "1:8"'),
        (("train", "a.yaml", "b.yaml"), 2, "a.yaml and b.yaml"),
        (("train", "--stesp", "4"), 2, "No such option"),
        (("train", "resume=a", "steps=3"), 2, "no other setting"),
        (("compare", "resume="), 2, "resume=runs/NAME"),
        (("verify", ".", "--targets", "1:16"), 2, "expected RULE=N:M"),
        (("verify", ".", "--targets", "ff=1:8", "--targets", "ff=1:16"), 2, "given twice"),
        (("verify", ".", "--targets", "ff=16:1"), 2, 'did you mean "1:16"'),
        (("verify", "no-such-file"), 2, "does not exist"),
        (("flops", "--help"), 0, "recipe=mdgf-exponential"),
        (("flops",), 2, "Missing argument"),
        (("flops", "vit-tiny", "steps=5"), 2, "need both"),
        (("flops", "vit-tiny", "recipe=ste", "steps=5"), 2, "of which weights?"),
        (("flops", "vit-tiny", "pattern=16:1"), 2, 'did you mean "1:16"'),
        (("flops", "vit-tiny", "pattern=1:16", "recipe=stee", "steps=5"), 2, 'did you mean "ste"'),
        (("targets", "vit-tiny", "--length", "0"), 2, "0 is not in the range"),
        (("compress", "only-one"), 2, "only-one"),
        (("compress", "."), 2, "Missing argument"),
        (("reproduce", "--help"), 0, "side by side"),
        (("reproduce",), 2, "which table?"),
        (("generate",), 2, "Missing argument"),
        (("generate", ".", "--prompt", "a", "--tokens", "0"), 2, "range"),
    ],
)
def test_help_and_wrong_usage_import_nothing_heavy(arguments: tuple[str, ...], code: int, expected: str) -> None:
    done = shell(*arguments, prefix=WITHOUT_HEAVY)
    assert (done.returncode, expected in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (done.stdout if code and arguments else ""), "an error goes to stderr"


def test_the_module_runs_as_a_command() -> None:
    done = shell("schedule", "mdgf-linear", "1:8", "--steps", "100")
    assert done.returncode == 0, done.stderr
    assert "5-69" in done.stdout
    assert "1 → 0.0154" in done.stdout
    assert not done.stderr


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import os, sys\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        "sys.argv = ['nmflow', 'schedule', 'ste', '1:8', '--json']\n"
        "from nmflow.cli import main\nmain()"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=False)
    assert done.stderr == b""
    assert done.returncode not in (0, 1, 2), "neither done, nor an answer, nor a wrong usage"


# schedule


@pytest.mark.parametrize("name", recipes())
def test_schedule_knows_every_recipe(name: str) -> None:
    done = call("schedule", name, "1:8", "--steps", "1000")
    assert done.exit_code == 0, done.output
    assert f"{name} to 1:8 (N of every M kept), 1,000 steps" in done.output
    assert recipe(name).at(0, 1000, "1:8").pruned_gradient in done.output
    assert ("chosen by gradients" in done.output) == (name == "snip")
    assert ("survivors" in done.output) == (name == "idp")


def test_schedule_json_is_the_plan() -> None:
    done = call("schedule", "sdgf-stepwise", "1:8", "--steps", "100", "--json", "dense=0.1", "decay_end=0.9")
    facts = json.loads(done.stdout)
    assert facts["recipe"] == recipe("sdgf-stepwise", dense=0.1, decay_end=0.9).to_dict()
    assert (facts["pattern"], facts["total_steps"], facts["plot"]) == ("1:8", 100, None)
    (only,) = facts["plans"]
    found = [(part["start"], part["end"], part["phase"], part["pattern"]) for part in only["segments"]]
    assert found == [
        (0, 10, "dense", "dense"),
        (10, 30, "decay", "7:8"),
        (30, 50, "decay", "4:8"),
        (50, 70, "decay", "2:8"),
        (70, 90, "decay", "1:8"),
        (90, 100, "fine-tune", "1:8"),
    ]
    assert only["segments"][0]["decay"] == [1.0, 1.0]
    assert [part["density"] for part in only["segments"]] == [1.0, 0.875, 0.5, 0.25, 0.125, 0.125]
    done = call("schedule", "mdgf-linear", "1:8", "--steps", "100", "--json", "dense=0.1", "decay_end=0.9")
    segments = json.loads(done.stdout)["plans"][0]["segments"]
    assert [part["decay"] for part in segments] == [[1.0, 1.0], [1.0, pytest.approx(1 / 80)], [0.0, 0.0]]


def test_schedule_shows_a_plan_for_every_axis_that_has_one_of_its_own() -> None:
    axes = ["--axis", "192", "--axis", "576", "--axis", "24"]
    done = call("schedule", "sdgf-geometric", "1:8", *axes)
    assert "axes 192, 576" in done.output
    assert "axis 24" in done.output
    assert "k = 8 (16·8 does not divide 192)" in done.output
    assert "k = 1, plain STE (2·8 does not divide 24)" in done.output
    plans = json.loads(call("schedule", "sdgf-geometric", "1:8", "--json", *axes).stdout)["plans"]
    assert [plan["axes"] for plan in plans] == [[192, 576], [24]]
    same = json.loads(call("schedule", "ste", "1:8", "--json", *axes).stdout)["plans"]
    assert [plan["axes"] for plan in same] == [[192, 576, 24]]


def test_schedule_takes_options_and_recipes_written_as_in_a_config() -> None:
    done = call("schedule", "mdgf-linear", "1:8", "--steps", "100", "schedule=[[0.1, 2:8], [0.5, 1:8]]")
    assert "10-49" in done.output
    assert "2:8" in done.output
    text = "[{recipe: sdgf-stepwise, until: 0.5, pattern: 4:16}, {recipe: {name: sr-ste, dense: 0.0}, until: 1}]"
    done = call("schedule", text, "1:16", "--steps", "1000")
    assert "sdgf-stepwise, then sr-ste to 1:16" in done.output
    assert "0.0002" in done.output
    facts = json.loads(call("schedule", text, "1:16", "--json").stdout)
    assert [part["outer"] for part in facts["plans"][0]["segments"]][-1] == "4:16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ste", "1:8", "denze=1"), 'error: recipe ste: no option "denze"; did you mean "dense"'),
        (("ste", "1:8", "dense"), 'option of the recipe as key=value'),
        (("ste", "1:8", "dense=0.1", "dense=0.2"), "each key once"),
        (("ste", "1:8", "dense=[0.1"), '"dense=[0.1": the value is no valid YAML'),
        (("ste", "1:8", "name=idp"), "as key=value"),
        (("ste", "1:8", "--steps", "many"), "not a valid integer"),
        (("sdgf-stepwise", "1:8", "--steps", "4"), "error: recipe sdgf-stepwise: total_steps=4 is too short"),
        (("ste", "1:8", "--steps", "0"), "error: total_steps=0: at least 1"),
        (("ste", "1:8", "--axis", "0"), "error: axis=0: at least 1"),
        (("[{recipe: ste}]", "1:8"), "error: recipe sequence: part 1"),
        (("[{recipe: ste, until: 1}]", "1:8", "dense=0.1"), "stand in the YAML"),
        (("ste", "1:8", "--plot", "no-such-folder/plan.png"), "error: [Errno 2] No such file or directory"),
    ],
)
def test_schedule_refuses(arguments: tuple[str, ...], message: str) -> None:
    done = call("schedule", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_schedule_plots(tmp_path: Path) -> None:
    for name, axes in (("mdgf-exponential", ()), ("sdgf-geometric", ("--axis", "768", "--axis", "24"))):
        path = tmp_path / f"{name}.png"
        done = call("schedule", name, "1:8", "--plot", str(path), *axes)
        assert done.exit_code == 0, done.output
        assert f"plot: {path}" in done.output
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 10_000


def test_what_is_plotted_is_what_the_recipe_says() -> None:
    from nmflow.report.plots_schedule import curve

    subject = recipe("mdgf-exponential", dense=0.1)
    drawn = curve(subject, 1000, "1:8")
    assert (drawn.steps[0], drawn.steps[-1]) == (0, 1000)
    assert list(drawn.steps) == sorted(drawn.steps)
    assert len(drawn.steps) > 200
    by_step = dict(zip(drawn.steps, drawn.stages, strict=True))  # of two points at a jump, the later one
    for step in (100, 103, 397, 700):
        assert by_step[step] == subject.at(step, 1000, "1:8")
    before = drawn.stages[drawn.steps.index(700)]
    assert before == subject.at(699, 1000, "1:8"), "the line goes to the jump, not through it"


# verify and compress


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finalized network in a file: two FF layers [32, 64] at 1:16, the first one's patterns recorded."""
    import torch
    from torch import nn

    from nmflow import Sparsifier
    from nmflow.runtime import save_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
    sparsifier = Sparsifier(model, {"0.weight": "1:16", "2.weight": "2:8"}, recipe="ste", total_steps=1)
    sparsifier.step()
    sparsifier.finalize()
    path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    save_model(model, path)
    return path


def rewritten(source: Path, destination: Path, row: int, column: int, *, recorded: bool = True) -> Path:
    """A copy with one more non-zero in 0.weight, with or without the record of what is sparse."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(source, "pt") as file:
        metadata = file.metadata() if recorded else None
    tensors = load_file(source)
    block = tensors["0.weight"][row, column // 16 * 16 : column // 16 * 16 + 16]
    assert int((block != 0).sum()) == 1
    assert tensors["0.weight"][row, column] == 0
    tensors["0.weight"][row, column] = 1e-30
    save_file(tensors, destination, metadata)
    return destination


def a_zero(path: Path, row: int, block: int) -> int:
    """A column of this row and block whose weight is zero."""
    from safetensors.torch import load_file

    weights = load_file(path)["0.weight"][row, 16 * block : 16 * block + 16].tolist()
    return 16 * block + weights.index(0.0)


def test_verify_says_yes(trained: Path) -> None:
    done = call("verify", str(trained))
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "verified: 2 of 2 layers are N:M")
    assert json.loads(call("verify", str(trained), "--json").stdout)["ok"] is True


def test_verify_says_no_and_where(trained: Path, tmp_path: Path) -> None:
    broken = rewritten(trained, tmp_path / "broken.safetensors", row=5, column=a_zero(trained, 5, 2))
    done = call("verify", str(broken))
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "not verified: 1 of 2 layers break their pattern"
    line = done.output.splitlines()[0]
    assert all(word in line for word in ("0.weight", "1:16", "row 5", "block 2", "2")), line
    facts = json.loads(call("verify", str(broken), "--json").stdout)
    assert facts["ok"] is False
    assert [layer["broken"] for layer in facts["layers"] if layer["label"].startswith("0.")] == [1]


def test_verify_asks_for_patterns_where_the_file_has_none(trained: Path, tmp_path: Path) -> None:
    bare = rewritten(trained, tmp_path / "bare.safetensors", 0, a_zero(trained, 0, 0), recorded=False)
    done = call("verify", str(bare))
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert "--targets ff=1:16" in done.output
    assert call("verify", str(bare), "--targets", "0.weight=1:16").exit_code == 1
    assert call("verify", str(bare), "--targets", "0.weight=2:16", "--targets", "2.weight=2:8").exit_code == 0


def test_a_fault_of_ours_is_no_answer(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nmflow

    def fail(*_: object) -> None:
        raise OverflowError("too much")

    monkeypatch.setattr(nmflow, "verify", fail)
    done = call("verify", str(trained))
    assert done.exit_code == 2, "1 would be: not N:M"
    assert "OverflowError: too much" in done.stderr


@pytest.mark.parametrize("command", ["verify", "compress"])
def test_a_file_that_is_none_of_ours(command: str, trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trained.read_bytes()[:-100])
    text = tmp_path / "notes.txt"
    text.write_text("not a network")
    for path in (cut, text, tmp_path):
        more = [str(tmp_path / "out.safetensors")] if command == "compress" else []
        done = call(command, str(path), *more)
        assert done.exit_code == 2, done.output
        assert done.output.startswith("error: ")
        assert path.name in done.output
    assert not (tmp_path / "out.safetensors").exists()


def test_compress_makes_a_smaller_file_that_verifies(trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    done = call("compress", str(trained), str(small))
    assert done.exit_code == 0, done.output
    before, after = trained.stat().st_size, small.stat().st_size
    assert after < before
    assert all(f"{size:,}" in done.output for size in (before, after)), done.output
    assert call("verify", str(small)).exit_code == 0
    assert call("compress", str(small), str(tmp_path / "again")).exit_code == 2
    assert json.loads(call("compress", str(trained), str(small), "--json").stdout)
    assert call("compress", str(trained), str(small), "--targets", "0.weight=1:64").exit_code == 2


# train and compare

TINY = ("model.width=24", "model.depth=1", "model.heads=2", "pattern=1:4", "steps=4", "batch=8")


def test_train_answers_on_stdout_and_shows_progress_on_stderr(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = shell("train", *TINY, f"out={run}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(run), "nothing but JSON"
    assert "4/4" in done.stderr
    assert call("verify", str(run)).exit_code == 0
    again = call("train", *TINY, f"out={run}")
    assert again.exit_code == 2, "the folder is taken"
    assert again.output.startswith("error: ")
    resumed = call("train", f"resume={run}")
    assert resumed.exit_code == 0, resumed.output
    assert "verified: 2 of 2 layers are N:M" in resumed.output.splitlines()
    assert any(line.startswith("sparse test accuracy") for line in resumed.output.splitlines())


def test_train_stops_on_ctrl_c_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "nmflow", "train", *TINY, "steps=1000000", "log_every=1", f"out={run}"]
    command.remove("steps=4")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        metrics = run / "dense" / "metrics.jsonl"
        deadline = time.monotonic() + 100
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"nmflow train resume={run}" in errors
    assert "Traceback" not in errors
    assert not output
    assert (run / "dense" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stesp=4", 'did you mean "steps"'),
        ("optim.lrr=1", 'did you mean "optim.lr"'),
        ("pattern=16:1", 'did you mean "1:16"'),
        ("no-such-file.yaml", "no-such-file.yaml"),
        ("resume=no-such-run", "no-such-run"),
        ("data=cifar10:no-such-folder", "no-such-folder"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_written(
    command: str, setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(command, setting)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_compare_prints_its_table(tmp_path: Path) -> None:
    out = tmp_path / "table"
    done = call("compare", *TINY, "recipes=dense,ste", "seeds=2", f"out={out}")
    assert done.exit_code == 0, done.output
    facts = json.loads(call("compare", f"resume={out}", "--json").stdout)
    assert facts
    for word in ("dense", "ste", "1:4", str(out)):
        assert word in done.output


def test_compare_ends_with_2_where_runs_failed_and_says_so_once(tmp_path: Path) -> None:
    out = tmp_path / "table"
    arguments = ("compare", *TINY, "recipes=[dense, {name: sr-ste, sr_ste: 1e38}]", "seeds=2", f"out={out}")
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert "| dense" in done.stdout
    assert "failed" not in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: 2 runs, the first sr-ste (sr_ste=1e+38) 1:4 seed 0: step ")
    again = call("compare", f"resume={out}", "--json")
    assert again.exit_code == 2
    assert len(json.loads(again.stdout)["failed"]) == 2


@pytest.mark.parametrize(("command", "setting"), [("train", "seed=0  "), ("compare", "seeds=0,1,2  ")])
def test_settings_are_listed(command: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(command, "steps=0", "--settings")
    assert done.exit_code == 0, done.output
    assert "optim.lr=0.001  (number)\n    Learning rate at its peak.\n" in done.stdout
    assert f"\n{setting}" in done.stdout
    assert not list(tmp_path.iterdir())


# doctor


def test_doctor_says_what_is_here() -> None:
    import torch

    import nmflow

    facts = json.loads(call("doctor", "--json").stdout)
    assert facts["nmflow"] == nmflow.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert facts["devices"][0] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert {kernel["task"] for kernel in facts["kernels"]} >= {"linear"}
    assert any(kernel["why_not"] is None for kernel in facts["kernels"])
    versions = {package["name"]: package["version"] for package in facts["packages"]}
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(versions) >= {"timm", "transformers", "tensorboard", "safetensors"}


def test_doctor_prints_the_same_for_people() -> None:
    facts = json.loads(call("doctor", "--json").stdout)
    done = call("doctor")
    assert done.exit_code == 0
    for word in (facts["torch"], facts["cpu"], *(kernel["name"] for kernel in facts["kernels"]), "tensorboard"):
        assert word in done.output
    for line in facts["missing"]:
        assert line in done.output


def test_doctor_says_what_a_plan_chose_and_what_the_others_took(tmp_path: Path) -> None:
    from nmflow.ops import native_plan
    from nmflow.ops.gpu import choice
    from nmflow.ops.gpu.two_four import Algorithm

    gpu, native, other = (str(tmp_path / name) for name in ("gpu.json", "native.json", "other.json"))
    plan = choice.Plan()
    key = choice.Key("A GPU", 4096, 1024, 1, 8, 1, "bfloat16", 13, True)
    plan.note(key, {choice.DENSE: 2e-5, choice.Way("2:4", Algorithm(7)): 1.5e-5})
    plan.save(gpu)
    said = "4096x1024 1:8 bfloat16, up to 8192 tokens on A GPU, in a CUDA graph: 2:4 number=7 (2:4 15 us, dense 20 us)"
    assert call("doctor", "--plan", gpu).stdout.splitlines()[-1] == f"  {said}"
    assert json.loads(call("doctor", "--plan", gpu, "--json").stdout)["choices"] == [said]
    tiling = native_plan.Tiling("rv", 0, 4, 16)
    native_plan.NativePlan({native_plan.Key(8, 16, 1, 4, "float32", 0, 2): tiling}).save(native)
    assert "  8x16 1:4 float32, up to 1 tokens on 2 threads: rv 0 4x16 rows" in call("doctor", "--plan", native).stdout
    for text in ("{}", "no json", '{"format": "nmflow-gpu-plan", "version": 0}'):
        Path(other).write_text(text)
        done = call("doctor", "--plan", other)
        assert (done.exit_code, "other.json" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_doctor_does_not_import_what_it_looks_for() -> None:
    optional = ("timm", "transformers", "tensorboard", "torchvision")
    check = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', [n for n in {optional!r} if n in sys.modules], file=sys.stderr))"
    )
    done = shell("doctor", "--json", prefix=check)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr


def test_doctor_looks_for_all_that_pyproject_names() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reads TOML, from Python 3.11 on")
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: held for name, held in project["optional-dependencies"].items() if name != "dev"}
    packages = json.loads(call("doctor", "--json").stdout)["packages"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split("[<>=!~;[ ]", each)[0] for each in requirements}

    assert {package["name"] for package in packages if package["required"]} == names(project["dependencies"])
    optional = {package["name"] for package in packages if not package["required"]} - {"triton"}  # torch brings it
    assert optional == set().union(*map(names, extras.values()))

    from nmflow import doctor

    assert {(name, extra) for extra, held in extras.items() for name in names(held)} == set(doctor._EXTRAS.items())


def test_doctor_names_what_is_missing_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from nmflow import doctor

    version = metadata.version

    def without(name: str) -> str:
        if name in ("timm", "pyyaml", "triton", "sacrebleu"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without)
    monkeypatch.setenv("PATH", "")
    missing = "\n".join(doctor.examine().missing)
    assert "timm is not installed (models by model=timm:NAME): pip install 'nmflow[timm]'" in missing
    assert "sacrebleu is not installed (BLEU of data=translation): pip install 'nmflow[translation]'" in missing
    assert "pyyaml is not installed, and nmflow needs it: pip install pyyaml" in missing
    assert "no C++ compiler" in missing
    assert "triton is not installed" not in missing


def test_memory_is_worked_out_by_the_shapes():
    """ViT-tiny's weights, 8 processes: a copy each has buckets, an eighth each has none but gathers."""
    [whole, spread] = (
        json.loads(call("memory", "vit-tiny", "--targets", "ff=1:8", "--processes", "8", "--json", *more).stdout)
        for more in ((), ("--shard", "--bf16"))
    )
    assert whole["gradients"] == 2 * whole["weights"] == whole["optimizer"]
    assert whole["effective"] == 4 * whole["masks"]
    assert whole["weights"] < 8 * spread["weights"] < 1.1 * whole["weights"]  # one row of positions is no eighth
    assert spread["gathered"] > 0 == whole["gathered"]
    assert 0.5 * whole["activations"] < spread["activations"] < 0.6 * whole["activations"]  # statistics stay float32
