"""What Triton makes of the kernels for an H100, looked at without one: no spills, wide loads, few instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nmflow.ops.gpu import project

SM90 = Path(__file__).with_name("sm90.py")


def compiled(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machine code of each kernel, in a process where Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, SM90, json.dumps(requests)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def projection(pattern: str, lie: str = "rows", dtype: str = "fp32", cast: bool = False) -> dict[str, Any]:
    """The projection of a large weight whose sizes fit the tiles."""
    n, m = map(int, pattern.split(":"))
    cut = project.tiling(n, m, 1 << 20, lie == "columns")
    strides = ("w_stride", "mask_stride", "effective_stride", "cast_stride")
    pointers = {"w_ptr": f"*{dtype}", "mask_ptr": "*u8", "effective_ptr": f"*{dtype}", "cast_ptr": "*bf16"}
    tile = {"N": n, "M": m, "WIDTH": cut.width, "BLOCKS": cut.blocks, "METHOD": cut.method}
    constants = {**tile, "COLUMNS": lie == "columns", "RAGGED": False, "TAIL": False}
    if not cast:
        constants["cast_ptr"] = None
    numbers = dict.fromkeys(("inner", "tiles", "axis", *strides), "i32")
    return {
        "kernel": "nmflow.ops.gpu.kernels.project.project_kernel",
        "signature": {**pointers, "flips_ptr": "*i64", "decay": "fp32", **numbers},
        "constants": constants,
        "divisible": [name for name in (*pointers, *strides, "inner") if cast or not name.startswith("cast")],
        "warps": cut.warps,
        "weights": cut.width * cut.blocks,
    }


# Instructions a weight: 201 million of them, ViT-Large's FF layers, at 30 are 180 µs of an H100's issue slots, less
# than the 470 µs that ten bytes a weight take at 4.3 TB/s.
PROJECTIONS = {
    "1:4": (projection("1:4"), 30),
    "2:4": (projection("2:4"), 40),
    "7:8": (projection("7:8"), 30),
    "1:16": (projection("1:16"), 30),
    "1:128": (projection("1:128"), 32),
    "16:128": (projection("16:128"), 80),
    "1:16 with a cast": (projection("1:16", cast=True), 36),
    "1:16 in bfloat16": (projection("1:16", dtype="bf16"), 36),
    "2:4 of columns": (projection("2:4", "columns"), 36),
    "1:16 of columns": (projection("1:16", "columns"), 32),
}


@pytest.fixture(scope="module")
def projections() -> dict[str, dict[str, Any]]:
    found = compiled([request for request, _ in PROJECTIONS.values()])
    return dict(zip(PROJECTIONS, found, strict=True))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_projection_waits_for_memory_alone(name: str, projections: dict[str, dict[str, Any]]) -> None:
    code, (request, most) = projections[name], PROJECTIONS[name]
    assert code["stack"] == code["local"] == 0, "registers are spilled"
    assert code["instructions"] * 32 * request["warps"] / request["weights"] <= most
    counts = code["counts"]
    width = 4 if request["signature"]["w_ptr"] == "*fp32" else 2
    per_thread = request["weights"] // (32 * request["warps"])
    assert counts["LDG.E.128"] >= per_thread * width / 16, f"W is not read by 16 bytes: {counts}"
    assert counts["STG.E.128"] >= per_thread * width / 16, f"W~ is not written by 16 bytes: {counts}"
    assert not [name for name in counts if name.startswith(("LDG", "STG")) and name.endswith("U8")], "mask byte by byte"
