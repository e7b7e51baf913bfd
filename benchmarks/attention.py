"""Attention under CPU autocast by torch's own rule and in float32: `python benchmarks/attention.py` prints a table.

One thread, forward and backward, median of the rounds; the two sides take turns.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median

import torch
import torch.nn.functional as F

from nmflow.train.attention import attention_in_float32

SHAPES = {  # batch, heads, tokens, width of a head; causal
    "ViT-tiny on CIFAR-10": ((64, 3, 17, 64), False),
    "MiniLM on sentences": ((32, 12, 64, 32), False),
    "a character model": ((16, 3, 128, 64), True),
    "ViT-Base": ((8, 12, 197, 64), False),
    "GPT-2": ((1, 12, 1024, 64), True),
}
ROUNDS = 15


def seconds(shape: tuple[int, ...], causal: bool, in_float32: bool) -> float:
    """One forward and backward pass of attention in bfloat16."""
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with attention_in_float32() if in_float32 else nullcontext():
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        out.backward(out)
        return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n")
    print("| attention of | batch, heads, tokens, width | autocast, ms | ours, ms | times |")
    print("|---|---|---|---|---|")
    for name, (shape, causal) in SHAPES.items():
        rounds = [(seconds(shape, causal, False), seconds(shape, causal, True)) for _ in range(ROUNDS)]
        theirs, ours = (1e3 * median(side) for side in zip(*rounds, strict=True))
        times = median(one / other for one, other in rounds)
        print(f"| {name} | {', '.join(map(str, shape))} | {theirs:.1f} | {ours:.1f} | {times:.2f} |")
