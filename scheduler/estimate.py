"""``estimate``: bytes of a model's plain step, and the largest batch that fits, without running either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.core.budget import format_bytes, machine_bytes, parse_budget
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.errors import CaptureError, InfeasibleBudget
from rematplan.scheduler.core.referee import simulate
from rematplan.scheduler.core.schedule import Backward, Keep, Schedule
from rematplan.scheduler.core.text_table import lines_of, new_table
from rematplan.scheduler.costs.meters.cuda_overheads import HANDLES, expandable_segments, workspace_bytes
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.solve import Priced, checked, priced
from rematplan.scheduler.solvers import solve_chain
from rematplan.scheduler.torch_layer.call import read_sample, unplanned
from rematplan.scheduler.torch_layer.fake import without_hardware
from rematplan.scheduler.torch_layer.leaves import map_tensors, tensors_in
from rematplan.scheduler.torch_layer.preserve import model_device

__all__ = ["Estimate", "estimate"]

MOST_CAPTURES = 6  # of one search for the largest batch


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a plain training step, and the largest batches that fit a budget.

    The categories do not add up to the peak: gradients appear in backward while activations are released.

    Attributes:
        device: name of the device.
        batch: the sample's batch size.
        parameters, optimizer_state, buffers, inputs: live during the whole step.
        gradients: of the parameters, when backward is done; those that exist already included.
        workspaces: of cuBLAS, live during the whole step.
        allocator_slack: set aside for the excess of large blocks in CUDA's allocator; 0 with expandable
            segments.
        other: live during the whole step: constants, small tensors.
        activations: saved tensors and outputs, by module; members of a list are one ("layers.*").
        peak: the most bytes live at once in the plain step.
        smallest: the smallest budget that a plan can meet.
        budget: as asked for; None if it was not.
        largest_plain, largest_planned: the largest batches that fit it without a plan and with one; 0 if none
            does.
    """

    device: str
    batch: int
    parameters: int
    gradients: int
    optimizer_state: int
    buffers: int
    inputs: int
    workspaces: int
    allocator_slack: int
    other: int
    activations: Mapping[str, int]
    peak: int
    smallest: int
    budget: int | None = None
    largest_plain: int | None = None
    largest_planned: int | None = None

    def __str__(self) -> str:
        table = new_table()
        table.add_column("what")
        table.add_column("bytes", justify="right")
        whole_step = ("inputs", "workspaces", "allocator_slack", "other")
        for name in ("parameters", "gradients", "optimizer_state", "buffers", *whole_step):
            if size := getattr(self, name):
                table.add_row(name.replace("_", " "), format_bytes(size))
        table.add_row("activations", format_bytes(sum(self.activations.values())))
        for name, size in self.activations.items():
            table.add_row(f"  {name}", format_bytes(size))
        table.add_section()
        table.add_row("peak of the plain step", format_bytes(self.peak))
        table.add_row("smallest budget of a plan", format_bytes(self.smallest))
        lines = [f"batch of {self.batch} on {self.device}"]
        lines += lines_of(100, table, markup=False, emoji=False, color_system=None)
        if self.budget is not None:
            lines.append(
                f"within {format_bytes(self.budget)}: a batch of {self.largest_plain} without a plan, "
                f"of {self.largest_planned} with one"
            )
        return "\n".join(lines)


def estimate(
    model: nn.Module,
    sample: Any,
    budget: int | str | None = None,
    device: DeviceSpec | str | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Estimate:
    """Return the bytes of one plain training step of ``model`` on ``sample``, without running it.

    Scratch space within kernels is not counted. The batch is the size of dimension 0 that most tensors of the
    sample share. The largest one that fits is found by a line through the bytes at this batch and at twice
    this; one more capture, at that batch, confirms it or moves the line.

    Args:
        model: in train mode; real, fake or on meta.
        sample: as for ``solve``.
        budget: bytes of the whole step, as for ``solve``; None to search for no batch.
        device: whose allocator's rules hold and whose memory "75%" is of; default: the device of the model.
        optimizer: its state counts.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        CaptureError: the model cannot be captured without data.

    Example:
        >>> print(estimate(model, batch, "80%", "H100"))  # doctest: +SKIP
    """
    model = unplanned(model)
    spec = _this_device(model) if device is None else DeviceSpec.of(device)
    limit = None if budget is None else parse_budget(budget, spec.memory)
    call = read_sample(sample)
    batch = _batch(call)
    if limit is not None and not batch:
        raise ValueError(
            "estimate: the sample has no tensor with a batch dimension, so no batch can be searched for"
        )

    def at(call: Any, *, options: bool = True) -> tuple[Priced, dict[str, int]]:
        request = checked(model, 2**62, call, "optimal", {}, "auto", "roofline", optimizer, spec, None)
        with without_hardware(request.model, request.call) as (twin, fakes):
            found = priced(replace(request, model=twin, call=fakes), options=options)
            producer = KINDS[found.captured.kind].producer()
            return found, producer.activations(found.captured, found.chain, _collapsed)

    def chain_at(other: int, *, options: bool = True) -> Chain:
        return at(_scaled(call, batch, other), options=options)[0].chain

    found, activations = at(call)
    chain, resident = found.chain, found.resident
    peaks, smallest = {batch: _plain(chain)}, {batch: _smallest(chain)}
    largest: tuple[int | None, int | None] = (None, None)
    if limit is not None:
        twice = chain_at(2 * batch)
        peaks[2 * batch], smallest[2 * batch] = _plain(twice), _smallest(twice)
        largest = (
            _largest(limit, peaks, lambda b: _plain(chain_at(b, options=False))),
            _largest(limit, smallest, lambda b: _smallest(chain_at(b))),
        )
    same = ("parameters", "optimizer state", "buffers", "inputs", "workspaces", "allocator slack")
    return Estimate(
        spec.name,
        batch,
        **{name.replace(" ", "_"): resident[name] for name in same},
        gradients=sum(stage.grad for stage in chain.stages) + resident["existing gradients"],
        other=resident.get("constants and replay state", 0),
        activations=activations,
        peak=peaks[batch],
        smallest=smallest[batch],
        budget=limit,
        largest_plain=largest[0],
        # Keeping everything is a plan, too: the line through the smallest budgets may miss it.
        largest_planned=None if largest[1] is None else max(largest[1], largest[0] or 0),
    )


def _this_device(model: nn.Module) -> DeviceSpec:
    """Return the device of the model, as far as bytes matter; for a model on meta, this machine."""
    device = model_device(model)
    if device.type == "cuda" and torch.cuda.is_available():
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        return DeviceSpec(
            "this GPU",
            memory,
            1e12,
            {"float32": 1e13},
            workspace=workspace_bytes(device) // HANDLES,
            expandable_segments=expandable_segments(device),
        )
    kind = "cuda" if device.type == "cuda" else "cpu"
    return DeviceSpec("this machine", machine_bytes(), 1e10, {"float32": 1e11}, kind=kind, workspace=0)


def _plain(chain: Chain) -> int:
    """Return the peak of the step that keeps everything."""
    stages = range(len(chain))
    return simulate(chain, Schedule((*map(Keep, stages), *map(Backward, reversed(stages))))).peak


def _smallest(chain: Chain) -> int:
    """Return the smallest budget that a plan can meet."""
    try:
        solve_chain(chain, 1)
    except InfeasibleBudget as error:
        return error.smallest
    return 1


def _collapsed(path: str) -> str:
    """Return a module's name up to the first member of a list (its number as "*"), or two parts of it."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:i], "*"])
    return ".".join(parts[:2]) or "the model's own code"


def _batch(call: Any) -> int:
    """Return the size of dimension 0 that most tensors share; 0 if there is none."""
    sizes = Counter(t.shape[0] for t in tensors_in(call) if t.ndim and t.shape[0])
    return sizes.most_common(1)[0][0] if sizes else 0


def _scaled(call: Any, batch: int, wanted: int) -> Any:
    """Return the call with another batch size, without data; a repeated tensor stays one."""
    memo: dict[int, Tensor] = {}

    def scale(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != batch:
            return tensor
        if id(tensor) not in memo:
            shape = (wanted, *tensor.shape[1:])
            like = torch.empty(shape, dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = like.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return map_tensors(scale, call)


def _largest(budget: int, known: dict[int, int], measure: Callable[[int], int]) -> int:
    """Return the largest batch within the budget, by lines through ``known``, bytes by batch."""
    for _ in range(MOST_CAPTURES):
        fits = max((b for b, size in known.items() if size <= budget), default=0)
        over = min((b for b, size in known.items() if size > budget), default=None)
        a, b = sorted(known, key=lambda b: abs(known[b] - budget))[:2]
        slope = (known[a] - known[b]) / (a - b)
        if slope <= 0:
            return fits
        guess = int(a + (budget - known[a]) / slope + 1e-9)
        guess = max(guess, fits) if over is None else min(max(guess, fits), over - 1)
        if guess == fits:
            return fits
        try:
            known[guess] = measure(guess)
        except CaptureError as error:
            raise CaptureError(f"estimate: at a batch of {guess}: {error}") from error
    return max((b for b, size in known.items() if size <= budget), default=0)
