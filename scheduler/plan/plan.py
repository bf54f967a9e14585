"""The plan: a chain, a schedule for it, and the origin of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rematplan.scheduler.core.budget import free_machine_bytes, machine_bytes, parse_budget
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.json_data import check_format
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.referee import Timeline, simulate
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Forward, Keep, Schedule
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.plan.plan_file import as_text, check_parts, check_plan, read_json
from rematplan.scheduler.plan.record import CaptureRecord
from rematplan.scheduler.plan.table import cost_table, explain
from rematplan.scheduler.solvers import SOLVERS, checked_solver, solve_chain

__all__ = ["CaptureRecord", "Plan"]

PLAN_FORMAT = 1
# Of ``Plan.resident``, what is live before a step as well.
ALIVE = ("parameters", "existing gradients", "buffers", "inputs", "workspaces")


@dataclass(frozen=True)
class Plan:
    """A schedule for a model and its predicted cost; ``solve`` makes it, ``execute`` runs it.

    Attributes:
        chain: the model's costs.
        schedule: what is run, held, kept and reversed.
        memory_budget: bytes of the whole step.
        solver: the solver's name.
        costs: "measure" or "roofline".
        capture: how the model was captured.
        resident: the chain's fixed bytes, by what they consist of.
        torch_version: of the torch that captured the model.
        optimizer_step: the most bytes that a step of the optimizer takes above parameters, gradients and its
            state; None if not known, 0 without an optimizer. Activations are gone by then.
        host: the second memory that the schedule copies to; None if it keeps to the device.
        live: the capture itself, as long as the plan stays in its process; never saved.
        parameters: what the solver was given besides chain and budget, likewise (it may be a function).
    """

    chain: Chain
    schedule: Schedule
    memory_budget: int
    solver: str
    costs: str
    capture: CaptureRecord
    resident: Mapping[str, int]
    torch_version: str
    optimizer_step: int | None = 0
    host: HostMemory | None = None
    live: Any = field(default=None, compare=False, repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.timeline.peak > self.memory_budget:
            raise ValueError(
                f"Plan: the schedule's peak of {self.timeline.peak} bytes is over memory_budget={self.memory_budget}"
            )
        # The program refuses a schedule that no executor can follow.
        kind = KINDS[self.capture.kind]
        if self.program.copies and not kind.copies:
            raise ValueError(
                "Plan: the schedule copies between device and host, which takes the ops of a graph, and the "
                f"model was captured as {self.capture.kind}. Choose another solver, or capture='graph' without backend="
            )
        options = [len(stage.options) for stage in self.chain.stages]
        for name in kind.options:
            given = [len(rows) for rows in getattr(self.capture, name)] or [1] * len(options)
            if len(given) != len(options) or any(map(int.__lt__, given, options)):
                raise ValueError(
                    f"Plan: capture.{name} has {given} entries a stage, the chain {options} options"
                )

    @cached_property
    def timeline(self) -> Timeline:
        """The referee's account of the schedule."""
        return simulate(self.chain, self.schedule, self.host)

    @cached_property
    def program(self) -> ReplayProgram:
        """The replay program."""
        return ReplayProgram.from_schedule(self.schedule, len(self.chain))

    @cached_property
    def plain(self) -> Timeline:
        """The referee's account of the plain step, which keeps everything."""
        stages = range(len(self.chain))
        return simulate(self.chain, Schedule((*map(Keep, stages), *map(Backward, reversed(stages)))))

    @property
    def predicted_peak(self) -> int:
        """The most bytes live at once in a step."""
        return self.timeline.peak

    @property
    def predicted_overhead(self) -> float:
        """Extra seconds of the planned step / seconds of the plain step."""
        plain = self.chain.plain_seconds
        return (self.timeline.seconds - plain) / plain if plain else 0.0

    def within(
        self,
        memory_budget: int | str,
        *,
        solver: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Plan the same model under another budget, by the same costs, without measuring again.

        Args:
            memory_budget: as for ``solve``: shares are of the device that the plan is for.
            solver: default: the plan's own with its ``host``, or "optimal" where that takes other parameters.
            parameters: what else the solver takes.

        Raises:
            TypeError, ValueError: an argument that cannot be used.
            InfeasibleBudget: no schedule fits; carries the smallest budget that one fits.
        """
        budget = parse_budget(memory_budget, self._device_bytes, self._free_bytes)
        parameters = parameters or {}
        if solver is None and SOLVERS[self.solver].two_level:
            solver, parameters = self.solver, {"host": self.host, **parameters}
        elif solver is None:
            solver = "optimal" if SOLVERS[self.solver].parameters else self.solver
        if not checked_solver("Plan.within", solver, parameters).executable:
            raise ValueError(
                f"Plan.within: solver={solver!r} makes schedules that executors cannot follow; choose another solver"
            )
        schedule, host = solve_chain(self.chain, budget, solver, **parameters), parameters.get("host")
        given = dict(parameters)
        return replace(
            self, memory_budget=budget, schedule=schedule, solver=solver, host=host, parameters=given
        )

    def _device_bytes(self) -> int:
        """Return bytes of the device that the plan is for."""
        record = self.capture
        if record.target:
            return record.target_memory or DeviceSpec.of(record.target).memory
        if record.device == "cpu":
            return machine_bytes()
        from rematplan.scheduler.torch_layer.device_memory import device_bytes  # which takes torch

        return device_bytes(record.device)

    def _free_bytes(self) -> int:
        """Return bytes of that device that a step may take, with what of the step is live there already."""
        if self.capture.target:
            return self._device_bytes()
        # Without the capture nothing says that the model is in this process.
        own = sum(self.resident.get(part, 0) for part in ALIVE) if self.live is not None else 0
        if self.capture.device == "cpu":
            return free_machine_bytes() + own
        from rematplan.scheduler.torch_layer.device_memory import free_device_bytes

        return free_device_bytes(self.capture.device) + own

    def kept(self, stage: int) -> str:
        """Say in words what stays of a stage when the forward is over."""
        option = self.program.kept[stage]
        if option is not None:
            return self.chain.stages[stage].options[option].name
        return "input" if stage in self._held_first else "nothing"

    @cached_property
    def _held_first(self) -> frozenset[int]:
        """The stages whose first run holds on to its input."""
        first: dict[int, bool] = {}
        for action in self.schedule:
            if isinstance(action, (Forward, Checkpoint, Keep)):
                first.setdefault(action.stage, isinstance(action, Checkpoint))
        return frozenset(stage for stage, held in first.items() if held)

    @cached_property
    def _options(self) -> dict[int, int]:
        return {action.stage: action.option for action in self.schedule if isinstance(action, Keep)}

    def option(self, stage: int) -> int:
        """Return the option with which a stage is kept when it is reversed."""
        return self._options[stage]

    def explain(self, stage: int) -> str:
        """Return the ops of a stage, one a line: K, autograd's saved bytes stay; R, it is recomputed.

        Raises:
            ValueError: the chain has no such stage, or the plan's stages are modules, whose ops nobody knows.
        """
        return explain(self, stage)

    def table(self) -> str:
        """Return the cost table: per stage what is kept, runs, seconds, bytes; then totals and the budget.

        In a long one the calls of one module in a row share a row: sums, and the largest input.
        """
        return cost_table(self)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "format": PLAN_FORMAT,
            "memory_budget": self.memory_budget,
            "solver": self.solver,
            "costs": self.costs,
            "torch_version": self.torch_version,
            "resident": dict(self.resident),
            "optimizer_step": self.optimizer_step,
            "host": None if self.host is None else asdict(self.host),
            "capture": asdict(self.capture),
            "chain": self.chain.to_json(),
            "schedule": self.schedule.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that ``to_json`` wrote. Data only: nothing in it is run.

        Raises:
            ValueError: the data is no plan, of an unknown format, or illegal.
        """
        check_format("Plan.from_json", data, PLAN_FORMAT)
        try:
            check_plan(data)
            chain, schedule = Chain.from_json(data["chain"]), Schedule.from_json(data["schedule"])
            record, solver = CaptureRecord(**data["capture"]), data["solver"]
            host = None if data.get("host") is None else HostMemory(**data["host"])
            check_parts(chain, schedule, record, solver, host)
            plain = {name: value for name, value in data.items() if name != "format"}
            parts = {"chain": chain, "schedule": schedule, "capture": record, "host": host}
            return cls(**{**plain, **parts, "resident": dict(data["resident"])})
        except ValueError as error:
            raise ValueError(
                f"Plan.from_json: not a plan: {error}; make the plan again with solve(), and save it with Plan.save"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a file that is there is replaced in one step, or left as it was."""
        file = Path(path)
        text = as_text(self.to_json())
        temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a plan; says which field is not what it should be.
        """
        try:
            return cls.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"Plan.load: {os.fspath(path)}: {error}") from error
