"""The house stands: a floor imports only from below, and nothing heavy or optional comes before it is used.

The floors are read from the table of docs/design.md, so that the page and the code cannot drift apart.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import nmflow

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nmflow"
OPTIONAL = {"timm", "transformers", "lightning", "pytorch_lightning", "tensorboard", "torchvision", "triton",
            "datasets", "sentencepiece", "sacrebleu"}
FACES = {"__init__", "__main__", "_version"}                      # know every floor by name, decide nothing
TRITON = Path("ops/gpu/kernels")                                  # Triton's own language: imported when launched
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


class Import(NamedTuple):
    target: str                                                   # absolute dotted name
    line: int
    at_import: bool                                               # runs when the module is imported


# ---------------------------------------------------------------------------------------------- reading
def floors(page: str) -> dict[str, int]:
    """Room -> height, from the rows of the page's floor table; the first row is the lowest."""
    rows = re.findall(r"^\| [\d']+ \| (.+?) \|", page, flags=re.MULTILINE)
    return {
        room.rstrip("/").removesuffix(".py"): height
        for height, row in enumerate(rows)
        for room in re.findall(r"`([^`]+)`", row)
    }


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands. `package`: the dotted package the file lies in."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import)
        for child in ast.iter_child_nodes(node):
            runs = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body:
                runs = False
            yield from visit(child, runs)

    return visit(ast.parse(source), True)


def room_of(dotted: str) -> str:
    """The room a dotted name of the package lies in; a public name of `nmflow` lies where it is made."""
    first = dotted.split(".")[1] if "." in dotted else "__init__"
    home = nmflow._HOME_OF.get(first)
    return room_of(home) if home else "__init__" if first.startswith("__") else first


def upward_imports(path: Path, source: str, height: dict[str, int]) -> list[str]:
    """Complaints about one file of the package (`path` relative to it)."""
    room = _room(path)
    if room in FACES:
        return []
    if room not in height:
        return [f"{path}: is on no floor of docs/design.md"]
    package = ".".join(("nmflow", *path.parts[:-1]))
    complaints = []
    for target, line, _ in imports_of(source, package):
        if target.split(".")[0] != "nmflow" or room_of(target) in FACES:
            continue
        if height.get(room_of(target), len(height)) > height[room]:
            complaints.append(f"{path}:{line}: {room} may not know {target}")
    return complaints


def read(path: Path) -> str:
    return (SOURCE / path).read_text(encoding="utf-8")


def _room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


HEIGHT = floors((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ floors
def test_the_table_of_floors_is_read() -> None:
    assert HEIGHT["pattern"] < HEIGHT["ops"] < HEIGHT["attach"] < HEIGHT["runtime"]
    assert HEIGHT["runtime"] < HEIGHT["report"] < HEIGHT["train"] < HEIGHT["experiments"] < HEIGHT["cli"]
    assert HEIGHT["targets"] == HEIGHT["sparsifier"]
    assert HEIGHT["integrations"] == HEIGHT["train"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_its_floor_and_below(path: Path) -> None:
    assert upward_imports(path, read(path), HEIGHT) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("masks.py", "from nmflow.attach import refresh"),
        ("masks.py", "from nmflow import Sparsifier"),
        ("masks.py", "def f():\n    import nmflow.sparsifier"),
        ("masks.py", "if TYPE_CHECKING:\n    from nmflow.runtime import verify"),
        ("schedules/plan.py", "from ..targets import resolve"),
        ("schedules/plan.py", "from .. import ops"),
        ("runtime/files.py", "try:\n    from nmflow import cli\nexcept ImportError:\n    pass"),
        ("ops/reference.py", "from nmflow.targets import Slot"),
        ("attic.py", "import math"),
        ("masks.py", "import nmflow.attic"),
    ],
)
def test_an_upward_import_is_found(path: str, source: str) -> None:
    assert len(upward_imports(Path(path), source, HEIGHT)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("masks.py", "from nmflow.pattern import Pattern"),
        ("masks.py", "from nmflow import Pattern, __version__"),
        ("schedules/plan.py", "from .stage import Stage\nfrom ..pattern import Pattern"),
        ("cli.py", "from nmflow.train import train"),
        ("sparsifier.py", "from nmflow.attach import refresh"),
    ],
)
def test_a_downward_import_is_not(path: str, source: str) -> None:
    assert upward_imports(Path(path), source, HEIGHT) == []


def test_no_two_files_import_each_other() -> None:
    modules = {_dotted(path): path for path in FILES}
    edges = {name: _modules_imported(path, set(modules)) - {name} for name, path in modules.items()}
    while free := [name for name, needs in edges.items() if not needs]:
        for name in free:
            del edges[name]
        for needs in edges.values():
            needs.difference_update(free)
    assert edges == {}, f"imports in a circle among {sorted(edges)}"


def _dotted(path: Path) -> str:
    return ".".join(("nmflow", *path.with_suffix("").parts)).removesuffix(".__init__")


def _modules_imported(path: Path, modules: set[str]) -> set[str]:
    """Modules that importing this file runs; a package counts where a name is taken from its face."""
    found = set()
    for target, _, at_import in imports_of(read(path), ".".join(("nmflow", *path.parts[:-1]))):
        for name in (target, target.rpartition(".")[0]):
            if at_import and name in modules and name != "nmflow":
                found.add(name)
                break
    return found


# --------------------------------------------------------------------------------- what a floor may use
def test_floor_0_knows_numbers_and_tensors_only() -> None:
    lowest = [path for path in FILES if HEIGHT.get(_room(path)) == 0]
    assert len(lowest) >= 4
    for path in lowest:
        for target, line, _ in imports_of(read(path), "nmflow"):
            assert target.split(".")[0] not in {"os", "io", "pathlib", "shutil", "tempfile"}, f"{path}:{line}"
            assert not target.startswith("torch.nn") or target == "torch.nn.functional", f"{path}:{line}"


def test_patterns_and_recipes_never_import_torch() -> None:
    for path in FILES:
        if _room(path) in {"pattern", "schedules"}:
            tops = {found.target.split(".")[0] for found in imports_of(read(path), "nmflow")}
            assert not tops & {"torch", "numpy"}, path


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != TRITON], ids=str)
def test_nothing_optional_is_imported_at_module_level(path: Path) -> None:
    for target, line, at_import in imports_of(read(path), "nmflow"):
        if at_import:
            optional = OPTIONAL & set(target.split(".")) or target.startswith("nmflow.ops.gpu.kernels")
            assert not optional, f"{path}:{line}: import {target} where it is used"


@pytest.mark.parametrize("path", [path for path in FILES if _room(path) not in {"cli", "__main__"}], ids=str)
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"print", "exit", "sys.exit", "os._exit"}, f"{path}:{node.lineno}: {name}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc), f"{path}:{node.lineno}"


def test_who_may_rewire_modules() -> None:
    """Training: attach. Inference: stored layers, streamed layers. Nobody else gives an object another class."""
    allowed = {"attach.py", "runtime/modules.py", "runtime/inference.py"}
    for path in FILES:
        for node in ast.walk(ast.parse(read(path))):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and node.attr == "__class__":
                assert path.as_posix() in allowed, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_first_line_says_what_the_file_decides(path: Path) -> None:
    assert ast.get_docstring(ast.parse(read(path))), f"{path} does not say what it decides"


# ------------------------------------------------------------------------------------- as Python sees it
def run_python(code: str) -> str:
    """What a fresh interpreter prints; it finds the package where this one found it."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["nmflow", "nmflow.pattern", "nmflow.schedules"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "numpy", "accelerate", "matplotlib", "sklearn", "pydantic"} | OPTIONAL
    loaded = run_python(f"import {module}; print(*sys.modules)").split()
    assert not heavy & set(loaded)


def test_listing_the_recipes_needs_no_torch() -> None:
    code = "import nmflow; nmflow.recipes(); nmflow.Pattern.parse('1:16'); print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_every_module_imports_without_the_optional_packages() -> None:
    names = sorted(_dotted(path) for path in FILES if path.name != "__main__.py" and path.parent != TRITON)
    code = f"sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))\nimport importlib\n"
    run_python(code + f"for name in {names!r}: importlib.import_module(name)")


def test_public_names_are_found_and_others_refused() -> None:
    assert set(nmflow.__all__) == {*nmflow._HOME_OF, "__version__"}
    assert dir(nmflow) == sorted(nmflow.__all__)
    for name in nmflow.__all__:
        assert getattr(nmflow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sparsifer'"):
        nmflow.Sparsifer  # type: ignore[attr-defined]  # noqa: B018  wrong on purpose
