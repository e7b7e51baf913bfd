"""Behaviour: one compiled graph serves a whole run, whatever decay and pattern do."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.runs import gradients, optimizer_of, sparsify

RUN = 50


def structure_then_mask_decay() -> object:
    """Patterns change from step 3 to 23, D from 26 to 40; from there on W~ is N:M."""
    options = {"dense": 0.1, "pruned_gradient": "decay"}
    structure = nmflow.recipe("sdgf-stepwise", decay_end=0.9, **options)
    mask = nmflow.recipe("mdgf-exponential", decay_end=0.6, **options)
    return nmflow.sequence(
        {"recipe": structure, "until": 0.5, "pattern": "2:4"}, {"recipe": mask, "until": 1.0}
    )


def check_compiled(host: Host, backend: str) -> None:
    """`RUN` optimizer steps without a recompile; outputs and gradients are the uncompiled model's."""
    model = host.build()
    sparsifier = sparsify(host, model, structure_then_mask_decay(), RUN)
    optimizer = optimizer_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda batch: host.loss(model, batch), fullgraph=True, backend=backend)
    stages = set()
    for step in range(RUN):
        batch = host.inputs(step)
        # The first call compiles; any later one that would is an error.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss: Tensor = compiled(batch)
            loss.backward()
        if step % 7 == 0:
            compiled_gradients = gradients(model)
            model.zero_grad()
            plain = host.loss(model, batch)
            plain.backward()
            torch.testing.assert_close(loss.detach(), plain.detach(), rtol=1e-4, atol=1e-5)
            for name, gradient in gradients(model).items():
                if gradient is not None:
                    torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-4)
        sparsifier.edit_gradients()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        stages |= {(slot.pattern, slot.decay) for slot in sparsifier.report().slots}
    assert len(stages) > 10
    torch._dynamo.reset()


def can_build_kernels() -> bool:
    """Whether inductor finds here what it builds native code with."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


@every_host
def test_compiled_once(host: Host) -> None:
    check_compiled(host, "aot_eager")


@pytest.mark.skipif(not can_build_kernels(), reason="inductor needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("name", ["linear", "encoder_layer_train"])
def test_compiled_to_native_code(name: str) -> None:
    check_compiled(HOST[name], "inductor")
