"""Write a plan as text: the cost table of its stages, and the ops of one stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.text_table import lines_of, new_table
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.plan.why_cut import explain_cut, summary

if TYPE_CHECKING:
    from rematplan.scheduler.plan.plan import Plan

__all__ = ["cost_table", "explain"]

MANY_ROWS = 64  # before the calls of one module share a row


def explain(plan: Plan, stage: int) -> str:
    """Write down the ops of a stage; see ``Plan.explain``."""
    chain, capture = plan.chain, plan.capture
    if not isinstance(stage, int) or not 0 <= stage < len(chain):
        raise ValueError(f"explain: stage={stage!r}, expected 0 .. {len(chain) - 1}")
    if not capture.ops:
        raise ValueError(
            f"explain: the stages of this plan are {capture.kind}; only a graph capture that is not compiled knows what "
            "becomes of each op"
        )
    first, option = plan.program.kept[stage], plan.option(stage)
    options = chain.stages[stage].options
    again = set(capture.rerun[stage][option]) if capture.rerun else set()
    lines = [
        f"stage {stage}: {chain.stages[stage].name}",
        *([explain_cut(capture.begins[stage - 1])] if stage and capture.begins else []),
        f"kept: {options[option].name}; {format_bytes(options[option].saved)} of {format_bytes(options[0].saved)}",
    ]
    if option:
        gap = capture.gaps[stage] if capture.gaps else 0.0
        proof = f"at most {gap:.1%} over the least" if gap else "the least"
        lines.append(
            f"{options[option].recompute * 1e3:.2f} ms to make the rest again: {proof} for these bytes, of "
            f"{len(options)} options"
        )
    if first is None:
        lines.append(
            f"nothing but its input outlives the forward: it runs {plan.timeline.runs[stage]} times, and is kept "
            "so when it is run for its backward"
        )
    for i, (name, size) in enumerate(capture.ops[stage]):
        mark = "R" if i in again else "K" if size else " "
        lines.append(f"  {mark} {name}" + (f"  {format_bytes(size)}" if size else ""))
    return "\n".join(lines)


def cost_table(plan: Plan) -> str:
    """Write down the costs of all stages, totals and the budget; see ``Plan.table``."""
    chain, timeline, capture = plan.chain, plan.timeline, plan.capture
    table = new_table()
    table.add_column("#", justify="right")
    table.add_column("stage", overflow="fold")
    table.add_column("kept", overflow="ellipsis", no_wrap=True, max_width=36)
    for heading in ("runs", "forward ms", "backward ms", "extra ms", "saved", "input"):
        table.add_column(heading, justify="right")
    for group in _groups(plan):
        table.add_row(*_row(plan, group))
    everything = range(len(chain))
    table.add_section()
    table.add_row(
        "", "total", "", *_sums(plan, everything, timeline.seconds - chain.plain_seconds, always=True), ""
    )
    # Names of stages have brackets and colons, which are no markup.
    lines = lines_of(130, table, markup=False, emoji=False, color_system=None)
    if stages := KINDS[capture.kind].stages:
        lines += ["", f"{len(chain)} stages: {stages}"]
    elif capture.begins:
        lines += ["", *summary(capture.begins, dict(capture.left_out))]
    return "\n".join([*lines, "", *_facts(plan)])


def _facts(plan: Plan) -> Iterator[str]:
    """Yield the lines below the table."""
    line, plain = plan.timeline, plan.chain.plain_seconds
    yield (
        f"budget {format_bytes(plan.memory_budget)}; predicted peak {format_bytes(plan.predicted_peak)}; "
        f"plain step {format_bytes(plan.plain.peak)}"
    )
    yield (
        f"predicted overhead {plan.predicted_overhead:.1%} "
        f"({line.seconds * 1e3:.1f} ms instead of {plain * 1e3:.1f} ms); "
        f"solver {plan.solver}, costs {plan.costs}"
        + (f" of {plan.capture.target}, which is not there" if plan.capture.target else "")
    )
    if plan.program.copies:
        assert plan.host
        yield (
            f"on the host: at most {format_bytes(line.host_peak)} of {format_bytes(plan.host.capacity)}; the device waits "
            f"{line.stall * 1e3:.1f} ms for copies"
        )
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.resident.items() if size)
    yield f"live all step: {parts}"
    if plan.optimizer_step:
        own = plan.optimizer_step
        there = own + sum(plan.resident.values()) + sum(stage.grad for stage in plan.chain.stages)
        over = ", over the budget" if there > plan.memory_budget else ""
        yield f"optimizer's step: {format_bytes(own)} of its own, {format_bytes(there)} in all{over}"
    yield f"captured as {plan.capture.kind}: {plan.capture.reason}"


def _groups(plan: Plan) -> list[range]:
    """Return the stages that share a row: each has its own, but for many calls of a module in a row."""
    names = [stage.name for stage in plan.chain.stages]
    if len(names) <= MANY_ROWS or not KINDS[plan.capture.kind].runs_code:
        return [range(i, i + 1) for i in range(len(names))]
    groups: list[range] = []
    for i, name in enumerate(names):
        if groups and "[" in name and names[i - 1].partition("[")[0] == name.partition("[")[0]:
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _row(plan: Plan, group: range) -> list[str]:
    """Return sums over the stages of a row; of inputs the largest."""
    stages = [plan.chain.stages[i] for i in group]
    extra = sum(
        (plan.timeline.runs[i] - 1) * stage.forward + stage.options[plan.option(i)].recompute
        for i, stage in zip(group, stages, strict=True)
    )
    single = len(group) == 1
    kept = Counter(plan.kept(i) for i in group)
    return [
        str(group[0]) if single else f"{group[0]}-{group[-1]}",
        stages[0].name if single else f"{stages[0].name} .. {stages[-1].name}",
        ", ".join(what if single else f"{count} {what}" for what, count in kept.items()),
        *_sums(plan, group, extra),
        format_bytes(max(stage.input for stage in stages)),
    ]


def _sums(plan: Plan, group: range, extra: float, *, always: bool = False) -> list[str]:
    """Return runs, milliseconds and saved bytes of some stages; ``always``: extra 0 milliseconds too."""
    stages = [plan.chain.stages[i] for i in group]
    return [
        str(sum(plan.timeline.runs[i] for i in group)),
        f"{sum(stage.forward for stage in stages) * 1e3:.2f}",
        f"{sum(stage.backward for stage in stages) * 1e3:.2f}",
        f"{extra * 1e3:.2f}" if extra or always else "",
        format_bytes(sum(plan.chain.stages[i].options[plan.option(i)].saved for i in group)),
    ]
