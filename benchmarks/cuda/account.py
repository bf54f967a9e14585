"""Check the account of bytes: measured against predicted bytes of a step."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.processes import ROOT
from benchmarks.cuda.steps import MIB, Training, planned_as, said, tight
from benchmarks.cuda.transformer import gpt
from rematplan import execute, rehearse, solve
from rematplan.scheduler.costs.meters.cuda_overheads import expandable_segments, workspace_bytes
from rematplan.scheduler.costs.meters.peak import count_bytes

__all__ = [
    "environment",
    "expandable_peaks",
    "optimizer",
    "peaks",
    "rehearse_real",
    "rehearse_without_data",
    "workspaces",
]

SCALARS = 4096  # bytes: numbers that an optimizer makes tensors of
CLOSE = 0.05  # by how much a rehearsal may differ from the prediction, as a share of it


def environment(found: Findings, machine: Machine) -> None:
    """Name the versions and the device; time the first plan, which compiles the solver's code with numba."""
    found.add("python", platform.python_version())
    found.add("torch", torch.__version__)
    for package in ("transformers", "numba", "scipy", "networkx", "rich"):
        with found.attempt(package):
            found.add(package, importlib.metadata.version(package))
    found.add("CPU cores", os.cpu_count())
    if machine.cuda:
        properties = torch.cuda.get_device_properties(machine.device)
        found.add("GPU", f"{properties.name}, compute capability {properties.major}.{properties.minor}")
        found.add("CUDA", torch.version.cuda)
        found.add("cuDNN", torch.backends.cudnn.version())
        free, total = torch.cuda.mem_get_info(machine.device)
        found.add("GiB free, in all", [round(free / 2**30, 1), round(total / 2**30, 1)])
        found.add("expandable segments", expandable_segments(machine.device))
        found.add("TF32 in matmuls, in cuDNN", [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32])  # fmt: skip
    found.add("files compiled by numba before", len(list((ROOT / "scheduler").rglob("*.nbc"))))
    for name in ("first", "second"):
        began = time.perf_counter()
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).to(machine.device)
        solve(model, 2**50, sample=torch.randn(64, 64, device=machine.device))
        found.add(f"{name} plan, s", round(time.perf_counter() - began, 2))
    found.add("files compiled by numba after", len(list((ROOT / "scheduler").rglob("*.nbc"))))


def workspaces(found: Findings, machine: Machine) -> None:
    """Compare the counted bytes of cuBLAS's workspaces with those that stay, and other bytes of products."""
    if not machine.cuda:
        found.add("skipped", "takes a CUDA device")
        return
    factor = torch.randn(64, 64, device=machine.device, requires_grad=True)
    bias = torch.randn(64, device=machine.device, requires_grad=True)
    seed = torch.ones(64, 64, device=machine.device)
    start = torch.cuda.memory_allocated()
    counted = workspace_bytes(machine.device)
    taken = torch.cuda.memory_allocated() - start
    found.add("counted MiB", counted / MIB, counted == taken)
    found.add("taken MiB", taken / MIB)
    product, sum_ = factor @ factor, torch.addmm(bias, factor, factor)
    (product + sum_).backward(seed)
    del product, sum_
    factor.grad = bias.grad = None
    more = torch.cuda.memory_allocated() - start - counted
    found.add("more MiB after products with and without a bias, reversed", more / MIB, more == 0)
    again = workspace_bytes(machine.device)
    found.add("counted again MiB", again / MIB, again == counted)
    _taken_one_by_one(found, factor, bias, seed)


def _taken_one_by_one(found: Findings, factor: Tensor, bias: Tensor, seed: Tensor) -> None:
    """Clear the workspaces, and see which product takes how much of them."""
    torch._C._cuda_clearCublasWorkspaces()
    factor.grad, bias.grad = torch.zeros_like(factor), torch.zeros_like(bias)
    start = torch.cuda.memory_allocated()
    for name, make in (
        ("a product", lambda: factor @ factor),
        ("a product with a bias", lambda: torch.addmm(bias, factor, factor)),
    ):
        made = make()
        size = made.untyped_storage().nbytes()
        found.add(f"{name}, MiB", (torch.cuda.memory_allocated() - start - size) / MIB)
        made.backward(seed)
        del made
        found.add(f"{name} and its backward, MiB", (torch.cuda.memory_allocated() - start) / MIB)


def peaks(found: Findings, machine: Machine) -> None:
    """Compare predicted with measured peaks of a GPT at three budgets by either capture, and watched ones."""
    found.add("expandable segments", expandable_segments(machine.device))
    training = Training(gpt(machine, 0.1, layers=6, width=512, batch=8, tokens=512), machine)
    for capture in ("graph", "modules"):
        with found.attempt(capture):
            plan = planned_as(found, training, capture)
            for share in (0.0, 0.5, 1.0):
                with found.attempt(f"{capture}, budget {share:.0%}"):
                    _peak(found, f"{capture}, budget {share:.0%}", training, tight(plan, share))


def _peak(found: Findings, name: str, training: Training, plan: Any) -> None:
    with said() as messages:
        measured = training.peaks(execute(plan, training.model))
    figures = {"predicted MiB": plan.predicted_peak / MIB, **measured, "said": "; ".join(messages)}
    found.add(name, figures, measured["measured bytes"] <= plan.predicted_peak and not messages)


def expandable_peaks(found: Findings, machine: Machine) -> None:
    """Do as ``peaks`` does, with expandable segments."""
    if machine.cuda:
        found.add(
            "the setting is on", expandable_segments(machine.device), expandable_segments(machine.device)
        )
    peaks(found, machine)


def rehearse_without_data(found: Findings, machine: Machine) -> None:
    """Rehearse a GPT with attention dropout on tensors without data, its kernels run one by one on zeros."""
    _rehearse(found, machine, real=False)


def rehearse_real(found: Findings, machine: Machine) -> None:
    """Rehearse the same step on data, and compare the observed peak with the predicted one."""
    _rehearse(found, machine, real=True)


def _rehearse(found: Findings, machine: Machine, *, real: bool) -> None:
    training = Training(gpt(machine, 0.1), machine)
    for capture in ("graph", "modules"):
        with found.attempt(capture):
            plan = tight(planned_as(found, training, capture), 0.2)
            seen = rehearse(plan, training.model, training.case.sample, real=real)
            figures: dict[str, Any] = {
                "predicted MiB": plan.predicted_peak / MIB,
                "rehearsed MiB": seen.peak / MIB,
                "requested MiB": seen.requested and seen.requested / MIB,
                "not counted": seen.uncounted,
            }
            found.add(capture, figures, abs(seen.peak / plan.predicted_peak - 1) <= CLOSE)


def optimizer(found: Findings, machine: Machine) -> None:
    """Compare what the plan says that an optimizer's step takes with what it takes."""
    width = machine.pick(1024, 64)
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": torch.optim.AdamW,
        "AdamW, foreach": functools.partial(torch.optim.AdamW, foreach=True),
        "AdamW, one by one": functools.partial(torch.optim.AdamW, foreach=False),
        "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
        "SGD with momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    }
    for name, make in kinds.items():
        with found.attempt(name):
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(16))).to(
                machine.device
            )
            batch = torch.randn(64, width, device=machine.device)
            stepper = make(model.parameters())
            plan = solve(model, 2**50, sample=batch, optimizer=stepper)
            model(batch).square().mean().backward()
            stepper.step()  # which makes the state
            taken = count_bytes(lambda _, stepper=stepper: stepper.step(), machine.device).peak  # type: ignore[misc]
            predicted = plan.optimizer_step
            figures = {"predicted MiB": predicted and predicted / MIB, "measured MiB": taken / MIB}
            found.add(name, figures, predicted is not None and taken <= predicted + SCALARS)
