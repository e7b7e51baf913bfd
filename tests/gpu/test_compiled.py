"""What Triton makes of the kernels for an H100, looked at without one: no spills, wide loads, few instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nmflow.ops.gpu import product, project

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


def groups(pattern: str, v: int) -> dict[str, Any]:
    """The projection where V rows share their columns."""
    n, m = map(int, pattern.split(":"))
    cut = project.tiling(n, m, 1 << 20, columns=False, entries=256)
    pointers = {"w_ptr": "*fp32", "mask_ptr": "*u8", "effective_ptr": "*fp32", "flips_ptr": "*i64", "decay": "fp32"}
    strides = ["w_stride", "mask_stride", "effective_stride", "num_rows", "tiles", "axis"]
    steps = dict.fromkeys(("w_step", "mask_step", "effective_step"), 1)
    tile = {"N": n, "M": m, "V": v, "WIDTH": cut.width, "BLOCKS": cut.blocks, "METHOD": cut.method}
    return {
        "kernel": "nmflow.ops.gpu.kernels.project.project_groups_kernel",
        "signature": {**pointers, **dict.fromkeys(strides, "i32")},
        "constants": {**tile, **steps, "cast_ptr": None, "cast_stride": 0, "cast_step": 0},
        "divisible": [*pointers][:3] + strides[:3],
        "warps": 2,
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
    "16:128": (projection("16:128"), 90),
    "1:16 with a cast": (projection("1:16", cast=True), 36),
    "1:16 in bfloat16": (projection("1:16", dtype="bf16"), 36),
    "2:4 of columns": (projection("2:4", "columns"), 36),
    "1:16 of columns": (projection("1:16", "columns"), 32),
}


@pytest.fixture(scope="module")
def projections() -> dict[str, dict[str, Any]]:
    found = compiled([*(request for request, _ in PROJECTIONS.values()), groups("1:8", 64)])
    return dict(zip([*PROJECTIONS, "groups"], found, strict=True))


def test_the_projection_of_groups_spills_nothing(projections: dict[str, dict[str, Any]]) -> None:
    assert projections["groups"]["stack"] == projections["groups"]["local"] == 0


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


# ------------------------------------------------------------------------------------------------ products
def gathered(tokens: int, dtype: str = "bf16") -> dict[str, Any]:
    """A part of a product with 1:8, of a weight whose sizes fit the tiles."""
    cut = product.tilings(14336, 512, tokens)[0]
    sizes = {"ROWS": cut.rows, "TOKENS": cut.tokens, "SLOTS": cut.slots, "UNROLL": product.UNROLL}
    constants = {"N": 1, "M": 8, **sizes, "SPLIT": True, "GUARDED": False, "ACTIVATION": None, "bias_ptr": None}
    pointers = {"x_ptr": f"*{dtype}", "values_ptr": f"*{dtype}", "offsets_ptr": "*u8", "y_ptr": "*fp32"}
    numbers = ["num_rows", "num_slots", "num_tokens", "axis"]
    return {
        "kernel": "nmflow.ops.gpu.kernels.product.gather_kernel",
        "signature": {**pointers, **dict.fromkeys(numbers, "i32")},
        "constants": constants,
        "divisible": [*pointers, "num_rows", "axis"],
        "warps": cut.warps,
        "weights": cut.rows * product.UNROLL,  # what one turn of the loop multiplies
    }


def shared(v: int, dtype: str = "bf16") -> dict[str, Any]:
    """A product with 1:8 of rows that share their columns by `v`, of many tokens."""
    cut = product.shared_tilings(v, 8192)[0]
    sizes = {"ROWS": cut.rows, "TOKENS": cut.tokens, "SLOTS": 512, "CHUNK": cut.chunk, "V": v, "TILES": 1}
    pointers = dict.fromkeys(("x_ptr", "values_ptr", "y_ptr", "bias_ptr"), f"*{dtype}") | {"offsets_ptr": "*u8"}
    numbers = ["num_rows", "num_slots", "num_tokens", "x_stride"]
    return {
        "kernel": "nmflow.ops.gpu.kernels.product.shared_kernel",
        "signature": {**pointers, **dict.fromkeys(numbers, "i32")},
        "constants": {"N": 1, "M": 8, **sizes, "GUARDED": False, "PRECISION": "tf32", "ACTIVATION": "gelu"},
        "divisible": [*pointers, "num_rows", "num_slots", "x_stride"],
        "warps": cut.warps,
    }


PRODUCTS = {
    "one token": gathered(1),
    "one token in float32": gathered(1, "fp32"),
    "many tokens": gathered(64),
    "64 rows share": shared(64),
    "128 rows share": shared(128),
    "32 rows share": shared(32),
    "64 rows share in TF32": shared(64, "fp32"),
}


@pytest.fixture(scope="module")
def products() -> dict[str, dict[str, Any]]:
    return dict(zip(PRODUCTS, compiled(list(PRODUCTS.values())), strict=True))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_spill_nothing(name: str, products: dict[str, dict[str, Any]]) -> None:
    assert products[name]["stack"] == products[name]["local"] == 0


@pytest.mark.parametrize(("name", "most"), [("one token", 12), ("one token in float32", 12), ("many tokens", 48)])
def test_a_gathered_product_asks_no_other_thread(name: str, most: int, products: dict[str, dict[str, Any]]) -> None:
    code, request = products[name], PRODUCTS[name]
    assert code["instructions"] * 32 * request["warps"] / request["weights"] <= most, "instructions a kept weight"
    assert code["counts"].get("BAR.SYNC.DEFER_BLOCKING", 0) <= 3, "barriers in the loop"
    assert code["counts"]["LDG.E.128"] >= product.UNROLL, code["counts"]


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "share" in name])
def test_shared_columns_run_on_tensor_cores(name: str, products: dict[str, dict[str, Any]]) -> None:
    counts = products[name]["counts"]
    wide = [operation for operation in counts if operation.startswith("HGMMA" if "32 rows" not in name else "HMMA")]
    assert wide, counts
    assert counts["LDGSTS.E.BYPASS.128"] > 0, "x is not gathered by 16 bytes, past the registers"
