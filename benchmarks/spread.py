"""What sparse training costs over dense training on several processes, in time and in memory: DDP and FSDP2.

    python -m torch.distributed.run --standalone --nproc_per_node=2 benchmarks/spread.py out=docs/results/spread-cpu

Steps of the dense and of the sparse network are taken in turns; a ratio is the median of the rounds' ratios. Memory is
counted from the tensors that a process holds after a step, and stands beside what `nmflow.memory` works out.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nmflow
from nmflow.memory import training_memory
from nmflow.shards import held
from nmflow.train.spread import repeated_blocks

MODEL, TARGETS, BATCH, ROUNDS = "vit_small_patch16_224", {"ff": "1:16"}, 4, 13
"""Images a process and step."""


class Side:
    """One network in training: dense or sparse, a copy for each process or spread over them."""

    def __init__(self, shard: bool, sparse: bool) -> None:
        torch.manual_seed(0)
        self.network = timm.create_model(MODEL, num_classes=10)
        self.sparsifier = nmflow.Sparsifier(self.network, TARGETS, "mdgf-exponential", 10_000) if sparse else None
        self.blocks = repeated_blocks(self.network) if shard else None
        self.model: nn.Module = self.network
        if self.blocks is not None:
            for block in self.blocks:
                fully_shard(block)
            fully_shard(self.network)
        else:
            self.model = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds of one optimizer step, all processes waited for."""
        dist.barrier()
        start = time.perf_counter()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        if self.sparsifier is not None:
            self.sparsifier.edit_gradients()
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        dist.barrier()
        seconds = time.perf_counter() - start
        return seconds

    def bytes(self) -> dict[str, int]:
        """What this process holds, by what it is for; gradients are still there."""
        parameters = list(self.network.parameters())
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values() if tensor.dim()]
        weights = list(self.sparsifier._effective.values()) if self.sparsifier is not None else []
        return {
            "weights": _bytes(parameters),
            "gradients": _bytes([each.grad for each in parameters if each.grad is not None]),
            "optimizer": _bytes(moments),
            "effective": _bytes([each.effective for each in weights]),
            "masks": _bytes([each.mask for each in weights]),
        }


def _bytes(tensors: list[Any]) -> int:
    return sum(held(tensor).numel() * tensor.element_size() for tensor in tensors)


def measure(shard: bool) -> dict[str, Any]:
    """Both sides in turns."""
    dense, sparse = Side(shard, False), Side(shard, True)
    torch.manual_seed(dist.get_rank())
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 10, (BATCH,))
    times: list[tuple[float, float]] = []
    found: dict[str, Any] = {}
    for turn in range(ROUNDS + 2):
        pair = dense.step(images, labels), sparse.step(images, labels)
        found = {"dense": dense.bytes(), "sparse": sparse.bytes()}
        dense.optimizer.zero_grad()
        sparse.optimizer.zero_grad()
        if turn >= 2:
            times.append(pair)
    ratios = [b / a for a, b in times]
    assert sparse.sparsifier is not None
    worked_out = training_memory(sparse.network, sparse.sparsifier.slots, dist.get_world_size(), sparse.blocks)
    return {
        "dense_s": statistics.median(a for a, _ in times),
        "sparse_s": statistics.median(b for _, b in times),
        "time": statistics.median(ratios),
        "time_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "memory": sum(found["sparse"].values()) / sum(found["dense"].values()),
        "bytes": found,
        "worked_out": worked_out.to_dict(),
    }


def main() -> None:
    """Measure, and let the first process write results.json and table.md."""
    out = Path(next(argument.removeprefix("out=") for argument in sys.argv[1:] if argument.startswith("out=")))
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {"DDP": measure(False), "FSDP2": measure(True)}
    if dist.get_rank() == 0:
        setup = {"model": f"timm:{MODEL}", "targets": TARGETS, "batch_a_process": BATCH, "rounds": ROUNDS,
                 "processes": dist.get_world_size(), "backend": "gloo", "threads_a_process": 1, "cores": os.cpu_count(),
                 "torch": torch.__version__, "nmflow": nmflow.__version__}  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps({"setup": setup, "results": results}, indent=1) + "\n")
        lines = [
            "# Sparse over dense training on several processes", "",
            f"{setup['model']}, {TARGETS}, mdgf-exponential, float32, {BATCH} images a process, {setup['processes']} "
            f"processes of one thread over gloo, torch {setup['torch']}, {ROUNDS} rounds in turns.", "",
            "| | dense step | sparse step | time | weights | gradients | moments | W~ | masks | memory held |",
            "| :- | -: | -: | -: | -: | -: | -: | -: | -: | -: |",
        ]  # fmt: skip
        for name, result in results.items():
            parts = [f"{value / 1e6:.1f} MB" for value in result["bytes"]["sparse"].values()]
            lines.append(
                f"| {name} | {result['dense_s']:.3f} s | {result['sparse_s']:.3f} s | x{result['time']:.3f} | "
                f"{' | '.join(parts)} | x{result['memory']:.3f} |"
            )
        (out / "table.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
