"""The plan: a chain, a schedule for it, and where both come from."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scheduler.budget import format_bytes, parse_budget
from scheduler.chain import Chain
from scheduler.cuts import Cut, explain_cut, summary
from scheduler.host import HostMemory
from scheduler.json_data import shown
from scheduler.kinds import KINDS
from scheduler.plan_file import as_text, check_parts, check_plan, read_json
from scheduler.program import ReplayProgram
from scheduler.schedule import Backward, Checkpoint, Forward, Keep, Schedule, Timeline, simulate
from scheduler.solvers import SOLVERS, checked_solver, solve_chain

__all__ = ["CaptureRecord", "Plan"]

PLAN_FORMAT = 1
MANY_ROWS = 64  # in the printed table, before the calls of one module share a row


@dataclass(frozen=True, slots=True)
class CaptureRecord:
    """How the model was captured: enough to capture it again, and to see that it is the same.

    Attributes:
        kind: a key of ``scheduler.kinds.KINDS``.
        reason: why this kind, in words.
        device: type of the device the plan is for.
        structure, leaves: the call's signature.
        model: fingerprint of the model.
        graph: fingerprint of the op graph ("" for modules).
        cuts: inner cuts of the op graph (empty for modules).
        stages: names of the modules that are stages, as often as they run (empty for graph).
        fed: for each of them, which outputs of those before are among its arguments: (argument leaf, output leaf, how many
            blocks back).
        random: (L,) whether a stage draws random numbers.
        changed: (L,) names of the buffers that a stage changes.
        dropped: (L,) for each option of a stage, the numbers of the saved tensors that it drops (empty for modules).
        rerun: (L,) for each option of a stage, the ops that run again, by their places in it (empty for modules).
        gaps: (L,) share by which the seconds of an option may exceed the least for its bytes; 0 if proven (likewise).
        ops: (L,) for each op of a stage, its name and the bytes that autograd saves of what it makes (likewise).
        uncached: whether stages run without autocast's cache of casts.
        begins: (L - 1,) why each stage but the first begins where it does (empty for modules, and in old plans).
        left_out: (why, how many) gaps that are no cuts after all.
        evaluating: names of submodules that were in eval mode.
        unread: leaves of the call, other than tensors, that the forward does not read.
        frozen: names of parameters that did not require grad.
        environment: what decides which ops run besides (``capture.environment``), as JSON; "" if not known.
        target: name of the device that was planned for without being there; "" for the one that held the model.
    """

    kind: str
    reason: str
    device: str
    structure: str
    leaves: str
    model: str
    graph: str = ""
    cuts: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()
    fed: tuple[tuple[tuple[int, ...], ...], ...] = ()
    random: tuple[bool, ...] = ()
    changed: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[tuple[tuple[int, ...], ...], ...] = ()
    rerun: tuple[tuple[tuple[int, ...], ...], ...] = ()
    gaps: tuple[float, ...] = ()
    uncached: bool = False
    ops: tuple[tuple[tuple[str, int], ...], ...] = ()
    begins: tuple[Cut, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()
    evaluating: tuple[str, ...] = ()
    unread: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    environment: str = ""
    target: str = ""

    def __post_init__(self) -> None:
        for name in ("cuts", "stages", "random", "gaps", "evaluating", "unread", "frozen"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "changed", tuple(tuple(names) for names in self.changed))
        for name in ("fed", "dropped", "rerun", "ops"):
            rows = tuple(tuple(tuple(row) for row in rows) for rows in getattr(self, name))
            object.__setattr__(self, name, rows)
        object.__setattr__(self, "begins", tuple(Cut(*row) for row in self.begins))
        object.__setattr__(self, "left_out", tuple((why, count) for why, count in self.left_out))
        if self.kind not in KINDS:
            raise ValueError(f"CaptureRecord: kind={self.kind!r}, expected {' or '.join(map(repr, KINDS))}")


@dataclass(frozen=True)
class Plan:
    """What to keep, what to recompute, and what that costs. Made by ``solve``, run by ``execute``.

    Attributes:
        chain: the model's costs.
        schedule: what is run, held, kept and reversed.
        memory_budget: bytes of the whole step.
        solver: the solver's name.
        costs: "measure" or "roofline".
        capture: how the model was captured.
        resident: the chain's fixed bytes, by what they consist of.
        torch_version: of the torch that captured the model.
        optimizer_step: the most bytes that a step of the optimizer takes above parameters, gradients and its state; None if
            not known, 0 without an optimizer. Activations are gone by then.
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
                "Plan: the schedule copies between device and host, which takes a graph capture: of modules, nobody has hold "
                "of what the code between them saves. Choose another solver, or capture='graph'"
            )
        if kind.options:
            options = [len(stage.options) for stage in self.chain.stages]
            for name in ("dropped", "rerun"):
                given = [len(rows) for rows in getattr(self.capture, name)] or [1] * len(options)
                if len(given) != len(options) or any(map(int.__lt__, given, options)):
                    raise ValueError(
                        f"Plan: capture.{name} has {given} entries a stage, the chain {options} options"
                    )

    @cached_property
    def timeline(self) -> Timeline:
        """What the referee says of the schedule."""
        return simulate(self.chain, self.schedule, self.host)

    @cached_property
    def program(self) -> ReplayProgram:
        """The replay program."""
        return ReplayProgram.from_schedule(self.schedule, len(self.chain))

    @cached_property
    def plain(self) -> Timeline:
        """What the referee says of the plain step, which keeps everything."""
        count = len(self.chain)
        keep = [Keep(i) for i in range(count)]
        return simulate(self.chain, Schedule((*keep, *(Backward(i) for i in reversed(range(count))))))

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
        """The same model under another budget: from the same costs, without capturing or measuring anything again.

        Args:
            memory_budget: as for ``solve``; a percentage is of this machine's memory.
            solver: default: the plan's own with its ``host``, or "optimal" where that takes other parameters.
            parameters: what else the solver takes.

        Raises:
            TypeError, ValueError: an argument that cannot be used.
            InfeasibleBudget: no schedule fits; carries the smallest budget that one fits.
        """
        budget = parse_budget(memory_budget)
        parameters = parameters or {}
        if solver is None and SOLVERS[self.solver].two_level:
            solver, parameters = self.solver, {"host": self.host, **parameters}
        elif solver is None:
            solver = "optimal" if SOLVERS[self.solver].parameters else self.solver
        if not checked_solver("Plan.within", solver, parameters).executable:
            raise ValueError(
                f"Plan.within: solver={solver!r} makes schedules that executors cannot follow; choose another solver"
            )
        schedule = solve_chain(self.chain, budget, solver, **parameters)
        host = parameters.get("host")
        return replace(
            self,
            memory_budget=budget,
            schedule=schedule,
            solver=solver,
            host=host,
            parameters=dict(parameters),
        )

    def kept(self, stage: int) -> str:
        """What stays of a stage when the forward is over, in words."""
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
        """The option with which a stage is kept when it is reversed."""
        return self._options[stage]

    def explain(self, stage: int) -> str:
        """The ops of a stage, one a line: K, what autograd saves of it is kept; R, it runs again before the backward.

        Raises:
            ValueError: there is no such stage, or the plan's stages are modules, whose ops nobody knows.
        """
        count = len(self.chain)
        if not isinstance(stage, int) or not 0 <= stage < count:
            raise ValueError(f"explain: stage={stage!r}, expected 0 .. {count - 1}")
        if not self.capture.ops:
            raise ValueError(
                "explain: the stages of this plan are modules; only a graph capture knows their ops"
            )
        first, option = self.program.kept[stage], self.option(stage)
        chosen = self.chain.stages[stage].options[option]
        again = set(self.capture.rerun[stage][option]) if self.capture.rerun else set()
        whole = self.chain.stages[stage].options[0].saved
        lines = [
            f"stage {stage}: {self.chain.stages[stage].name}",
            *([explain_cut(self.capture.begins[stage - 1])] if stage and self.capture.begins else []),
            f"kept: {chosen.name}; {format_bytes(chosen.saved)} of {format_bytes(whole)}",
        ]
        if option:
            gap = self.capture.gaps[stage] if self.capture.gaps else 0.0
            proof = f"at most {gap:.1%} over the least" if gap else "the least"
            lines.append(
                f"{chosen.recompute * 1e3:.2f} ms to make the rest again: {proof} for these bytes, of "
                f"{len(self.chain.stages[stage].options)} options"
            )
        if first is None:
            lines.append(
                f"nothing but its input outlives the forward: it runs {self.timeline.runs[stage]} times, and is kept "
                "so when it is run for its backward"
            )
        for i, (name, size) in enumerate(self.capture.ops[stage]):
            mark = "R" if i in again else "K" if size else " "
            lines.append(f"  {mark} {name}" + (f"  {format_bytes(size)}" if size else ""))
        return "\n".join(lines)

    def table(self) -> str:
        """The cost table: per stage what is kept, runs, seconds, bytes; then totals and the budget.

        In a long one the calls of one module in a row share a row: sums, and the largest input.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        chain, runs = self.chain, self.timeline.runs
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("#", justify="right")
        table.add_column("stage", overflow="fold")
        table.add_column("kept", overflow="ellipsis", no_wrap=True, max_width=36)
        for heading in ("runs", "forward ms", "backward ms", "extra ms", "saved", "input"):
            table.add_column(heading, justify="right")
        for group in self._rows():
            table.add_row(*(self._row(group[0]) if len(group) == 1 else self._row_of_calls(group)))
        table.add_section()
        table.add_row(
            "",
            "total",
            "",
            str(sum(runs)),
            f"{sum(s.forward for s in chain.stages) * 1e3:.2f}",
            f"{sum(s.backward for s in chain.stages) * 1e3:.2f}",
            f"{(self.timeline.seconds - chain.plain_seconds) * 1e3:.2f}",
            format_bytes(sum(s.options[self.option(i)].saved for i, s in enumerate(chain.stages))),
            "",
        )
        out = io.StringIO()
        # Names of stages have brackets and colons, which are no markup.
        console = Console(file=out, width=130, highlight=False, markup=False, emoji=False, color_system=None)
        console.print(table)
        lines = [line.rstrip() for line in out.getvalue().strip("\n").splitlines()]
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.resident.items() if size)
        if stages := KINDS[self.capture.kind].stages:
            lines += ["", f"{len(chain)} stages: {stages}"]
        elif self.capture.begins:
            lines += ["", *summary(self.capture.begins, dict(self.capture.left_out))]
        lines += [
            "",
            (
                f"budget {format_bytes(self.memory_budget)}; predicted peak {format_bytes(self.predicted_peak)}; "
                f"plain step {format_bytes(self.plain.peak)}"
            ),
            (
                f"predicted overhead {self.predicted_overhead:.1%} "
                f"({self.timeline.seconds * 1e3:.1f} ms instead of {chain.plain_seconds * 1e3:.1f} ms); "
                f"solver {self.solver}, costs {self.costs}"
                + (f" of {self.capture.target}, which is not there" if self.capture.target else "")
            ),
            *([self._host_line()] if self.program.copies else []),
            f"live all step: {parts}",
            *([self._optimizer_line()] if self.optimizer_step else []),
            f"captured as {self.capture.kind}: {self.capture.reason}",
        ]
        return "\n".join(lines)

    def _rows(self) -> list[list[int]]:
        """The stages that share a row: each has its own, but for the many calls of a module in a row."""
        modules = [stage.name.partition("[")[0] for stage in self.chain.stages]
        rows: list[list[int]] = []
        for i, name in enumerate(modules):
            if rows and "[" in self.chain.stages[i].name and modules[rows[-1][-1]] == name:
                rows[-1].append(i)
            else:
                rows.append([i])
        folded = len(modules) > MANY_ROWS and KINDS[self.capture.kind].runs_code
        return rows if folded else [[i] for i in range(len(modules))]

    def _row(self, i: int) -> list[str]:
        stage, runs = self.chain.stages[i], self.timeline.runs[i]
        option = stage.options[self.option(i)]
        extra = (runs - 1) * stage.forward + option.recompute
        return [
            str(i),
            stage.name,
            self.kept(i),
            str(runs),
            f"{stage.forward * 1e3:.2f}",
            f"{stage.backward * 1e3:.2f}",
            f"{extra * 1e3:.2f}" if extra else "",
            format_bytes(option.saved),
            format_bytes(stage.input),
        ]

    def _row_of_calls(self, group: list[int]) -> list[str]:
        """Sums over the calls of a module; of inputs the largest."""
        stages = [self.chain.stages[i] for i in group]
        options = [self.chain.stages[i].options[self.option(i)] for i in group]
        runs = [self.timeline.runs[i] for i in group]
        extra = sum((n - 1) * s.forward + o.recompute for n, s, o in zip(runs, stages, options, strict=True))
        kept = Counter(self.kept(i) for i in group)
        return [
            f"{group[0]}-{group[-1]}",
            f"{stages[0].name} .. {stages[-1].name}",
            ", ".join(f"{count} {what}" for what, count in kept.items()),
            str(sum(runs)),
            f"{sum(s.forward for s in stages) * 1e3:.2f}",
            f"{sum(s.backward for s in stages) * 1e3:.2f}",
            f"{extra * 1e3:.2f}" if extra else "",
            format_bytes(sum(o.saved for o in options)),
            format_bytes(max(s.input for s in stages)),
        ]

    def _host_line(self) -> str:
        """What is copied to the host, in words."""
        assert self.host
        line = self.timeline
        return (
            f"on the host: at most {format_bytes(line.host_peak)} of {format_bytes(self.host.capacity)}; the device waits "
            f"{line.stall * 1e3:.1f} ms for copies"
        )

    def _optimizer_line(self) -> str:
        """What the optimizer's own step takes, in words."""
        assert self.optimizer_step
        there = self.optimizer_step + sum(self.resident.values()) + sum(s.grad for s in self.chain.stages)
        over = ", over the budget" if there > self.memory_budget else ""
        return f"optimizer's step: {format_bytes(self.optimizer_step)} of its own, {format_bytes(there)} in all{over}"

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
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
        """The plan that ``to_json`` wrote. Data only: nothing in it is run.

        Raises:
            ValueError: the data is no plan, of an unknown format, or illegal.
        """
        if not isinstance(data, Mapping) or data.get("format") != PLAN_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"Plan.from_json: format {shown(found)}, expected {PLAN_FORMAT}")
        try:
            check_plan(data)
            chain, schedule = Chain.from_json(data["chain"]), Schedule.from_json(data["schedule"])
            record, solver = CaptureRecord(**data["capture"]), data["solver"]
            host = None if data.get("host") is None else HostMemory(**data["host"])
            check_parts(chain, schedule, record, solver, host)
            return cls(
                chain=chain,
                schedule=schedule,
                memory_budget=data["memory_budget"],
                solver=solver,
                costs=data["costs"],
                capture=record,
                resident=dict(data["resident"]),
                optimizer_step=data.get("optimizer_step", 0),
                host=host,
                torch_version=data["torch_version"],
            )
        except ValueError as error:
            raise ValueError(
                f"Plan.from_json: not a plan: {error}; make the plan again with solve(), and save it with Plan.save"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a file that is there is replaced in one step, or left as it was."""
        target = Path(path)
        text = as_text(self.to_json())
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
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
