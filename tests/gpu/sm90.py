"""Compiles kernels for an H100 (sm_90) without one, and says of each what its machine code holds.

`python sm90.py REQUESTS` reads a JSON list of {kernel, signature, constants, divisible, warps} and prints one of
{instructions, registers, stack, local, counts}. A process of its own: in the interpreter nothing is compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Triton is imported where it is used: who collects examples looks into this file on machines that have none.
OPERATION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel and take its machine code apart."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request["kernel"].rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    signature = {**request["signature"], **dict.fromkeys(request["constants"], "constexpr")}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        constexprs={places[name]: value for name, value in request["constants"].items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in request["divisible"]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": request["warps"]})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        operations = OPERATION.findall(_output("nvdisasm", file.name))
        registers, stack, local = map(int, USAGE.findall(_output("cuobjdump", "-res-usage", file.name))[-1])
    return {
        "instructions": len(operations),
        "registers": registers,
        "stack": stack,
        "local": local,
        "counts": dict(Counter(operations)),
    }


def _output(tool: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps([look(request) for request in json.loads(sys.argv[1])]))
