"""A captured training step as a Dag of ops, and the plan of its chain as a plan of that Dag.

A value is a storage (a new one after each change in place), or the gradient of one. A forward op makes
values; views are free. Each op that needs a gradient has a backward turn, in reverse order: it reads what
autograd saved for it and takes twice the seconds. What the Dag simplifies, for all plans alike:

* there are no workspaces; a gradient has the bytes of its value, and that of an addend which nothing else
  reads is the gradient of the sum; gradients of parameters stay from when they are made, outputs too;
* parameters, inputs and buffers are left out: they are always there; so are ops that lead to none with a
  gradient;
* an op whose result has one reader, in the same stage, and is not saved, is one op with that reader: it
  cannot be held between the two;
* a backward that reads nothing saved is one turn with the one before it;
* a random op may run again without those before it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rematplan.scheduler.bounds.dag import Dag, DagAction, Drop, Op, Run, Turn
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.capture.graph.recompute import compile_rebuilds
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Action, Backward, Checkpoint, Free, Keep
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.option_costs import TimedOps

__all__ = ["OpDag", "measured_seconds", "op_dag", "op_seconds", "priced", "relaxed_dag", "translate"]


@dataclass(frozen=True, slots=True)
class OpDag:
    """A Dag, and where it came from.

    Attributes:
        dag: forward ops first; each op has a turn of its own.
        at: for each graph op, (storage -> value) of what it has seen or made.
        forward: (L,) for each stage its forward ops: (op of the Dag, graph ops that it stands for).
        backward: (L,) for each stage its backward ops, in the order in which they run.
    """

    dag: Dag
    at: tuple[dict[int, int], ...]
    forward: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    backward: tuple[tuple[int, ...], ...]


def op_seconds(capture: GraphCapture, flat: Sequence[Any], *, clock: bool = False) -> list[float]:
    """Seconds of each op, run in grad mode on the flattened call: by the roofline, or by the clock.

    By the clock buffers and random numbers move on, as in any forward.
    """
    timed = TimedOps(capture.graph.module, capture.device, clock)
    with torch.enable_grad():
        timed.run(*flat, enable_io_processing=False)
    return timed.seconds()


def measured_seconds(
    capture: GraphCapture, flat: Sequence[Any], chain: Chain, repeats: int = 5
) -> list[float]:
    """Seconds of each op, such that no stage and no option of ``chain`` is priced below the sum of its ops.

    Medians of single ops, over equal stages too, scaled by one factor a stage: the greatest that keeps the
    sum of all ops within the stage's forward, and that of the ops which an option runs again within its
    ``recompute``.
    """
    runs = [op_seconds(capture, flat, clock=True) for _ in range(repeats)]
    slices = [slice(a, b) for a, b in itertools.pairwise(capture.linear.cuts)]
    alike: dict[str, list[list[float]]] = {}
    for stage, ops in zip(capture.stages, slices, strict=True):
        alike.setdefault(stage.signature, []).extend(run[ops] for run in runs)
    seconds: list[float] = []
    for k, (stage, costs) in enumerate(zip(capture.stages, chain.stages, strict=True)):
        medians = [statistics.median(times) for times in zip(*alike[stage.signature], strict=True)]
        sums = [math.fsum(medians), *(math.fsum(medians[i] for i in rerun) for rerun in capture.rerun[k][1:])]
        prices = [costs.forward, *(option.recompute for option in costs.options[1:])]
        scale = min((price / total for price, total in zip(prices, sums, strict=True) if total), default=1.0)
        seconds += [scale * value for value in medians]
    return seconds


@dataclass(slots=True)
class _Values:
    """The values of a captured step: those that each graph op reads, makes and saves for a gradient.

    Attributes:
        size: (V,) bytes.
        needs_grad: (V,) whether it requires grad.
        maker: (V,) the graph op that makes it.
        in_place: values that come of a change in place.
        seen: for each graph op, (storage -> value) of what it has seen or made.
        reads, makes, saves: graph op -> values.
        flows: graph op -> the values that it reads as tensors that require grad.
        leaving: values that the model returns.
        loss: the value of its first output.
    """

    size: list[int] = field(default_factory=list)
    needs_grad: list[bool] = field(default_factory=list)
    maker: list[int] = field(default_factory=list)
    in_place: set[int] = field(default_factory=set)
    seen: list[dict[int, int]] = field(default_factory=list)
    reads: dict[int, list[int]] = field(default_factory=dict)
    makes: dict[int, list[int]] = field(default_factory=dict)
    saves: dict[int, list[int]] = field(default_factory=dict)
    flows: dict[int, set[int]] = field(default_factory=dict)
    leaving: set[int] = field(default_factory=set)
    loss: int = -1


def _values(graph: OpGraph) -> _Values:
    groups = graph.groups
    found = _Values()
    wanted: set[int] = set()  # ops that need a gradient, and those that lead to them (draws of a dropout)
    for i in reversed(range(len(graph.ops))):
        if graph.ops[i].requires_grad or i in wanted:
            read = [groups[g] for g in (*graph.ops[i].reads, *graph.ops[i].saved)]
            wanted.update((i, *(o for g in read for o in (g.producer, *g.mutated) if 0 <= o < i)))
    now: dict[int, int] = {}  # storage -> its latest value
    for i, op in enumerate(graph.ops):
        made = [g for g in dict.fromkeys((*op.writes, *op.saved)) if groups[g].producer == i]
        made += [g for g in op.reads if i in groups[g].mutated and g in now]
        if i in wanted and made:
            found.reads[i] = [now[g] for g in op.reads if g in now]
            given = (g for n in op.node.all_input_nodes if graph.grad_of[n] for g in graph.group_of[n])
            found.flows[i] = {now[g] for g in given if g in now}
            found.makes[i] = list(range(len(found.size), len(found.size) + len(made)))
            for g in made:
                if groups[g].producer != i:
                    found.in_place.add(len(found.size))
                now[g] = len(found.size)
                found.size.append(groups[g].bytes)
                found.needs_grad.append(groups[g].requires_grad)
                found.maker.append(i)
        found.seen.append({g: now[g] for g in (*op.reads, *op.writes, *op.saved) if g in now})
    found.saves = {
        i: [found.seen[i][g] for g in graph.ops[i].saved if g in found.seen[i]] for i in found.makes
    }
    outputs = {g for leaf in graph.outputs if leaf in graph.group_of for g in graph.group_of[leaf]}
    found.leaving = {now[g] for g in outputs if g in now}
    found.loss = now[graph.group_of[graph.outputs[0]][0]]
    return found


def op_dag(capture: GraphCapture, seconds: Sequence[float]) -> OpDag:  # noqa: C901 - one list of what becomes an op
    """The Dag of a captured step whose first output is its loss.

    Args:
        seconds: of each op.
    """
    graph, linear = capture.graph, capture.linear
    groups = graph.groups
    stage_of = [k for k, (a, b) in enumerate(itertools.pairwise(linear.cuts)) for _ in range(a, b)]
    found = _values(graph)
    size, reads, makes, seen = found.size, found.reads, found.makes, found.seen
    readers: list[list[int]] = [[] for _ in size]
    for i, values in reads.items():
        for v in values:
            readers[v].append(i)
    leaving = found.leaving
    fast = {v for values in found.saves.values() for v in values} | leaving

    joined: dict[int, list[int]] = {}  # the last graph op of a forward op -> all of them
    for i in makes:
        joined[i] = [i]
        for a in {found.maker[v] for v in reads[i]}:
            if stage_of[a] == stage_of[i] and all(readers[v] == [i] and v not in fast for v in makes[a]):
                joined[i] = sorted(joined.pop(a) + joined[i])

    number: dict[int, int] = {}  # value of the first count -> value of the Dag
    sizes: list[int] = []
    ops: list[Op] = []
    turns: list[Turn] = []
    forward: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(len(linear))]
    for last, members in joined.items():
        inner = {v for i in members if i != last for v in makes[i]}
        given = dict.fromkeys(v for i in members for v in reads[i] if v not in inner)
        for v in makes[last]:
            number[v] = len(sizes)
            sizes.append(0 if v in leaving else size[v])
        forward[stage_of[last]].append((len(ops), tuple(members)))
        turns.append(Turn((len(ops),), starts=sum(size[v] for v in makes[last] if v in leaving)))
        ops.append(
            Op(
                "+".join(graph.ops[i].node.name for i in members),
                sum(seconds[i] for i in members),
                tuple((number[v],) for v in given),
                tuple(number[v] for v in makes[last]),
                _inside(members, reads, makes, [0 if v in found.in_place else b for v, b in enumerate(size)]),
            )
        )

    loss = found.loss
    gradient: dict[int, int] = {}
    parameters_left = {g for g, group in groups.items() if group.producer < 0 and group.requires_grad}
    backward: list[list[int]] = [[] for _ in range(len(linear))]
    written: set[int] = set()
    for i in reversed(makes):
        arriving = [gradient[v] for v in makes[i] if v in gradient]
        if not arriving and loss not in makes[i]:
            continue
        writes = []
        for v in (v for v in reads[i] if found.needs_grad[v]):
            if arriving and not graph.ops[i].saved and readers[v] == [i] and size[v] == size[makes[i][0]]:
                gradient[v] = arriving[0]
                continue
            if v not in gradient:
                gradient[v] = len(sizes)
                sizes.append(size[v])
            writes.append(gradient[v])
        created = parameters_left.intersection(graph.ops[i].reads)
        parameters_left -= created
        ends = sum(groups[g].bytes for g in created)
        needs = [number[v] for v in found.saves[i]]
        given = dict.fromkeys([*arriving, *needs, *(v for v in writes if v in written)])
        written.update(writes)
        if not writes and not ends:
            continue
        turn = Op(
            f"{graph.ops[i].node.name}'", 2 * seconds[i], tuple((v,) for v in given), tuple(writes), 0, True
        )
        if backward[stage_of[i]] and not needs:
            before = ops.pop()
            ends += turns.pop().ends
            more = [(v,) for v in given if v not in before.writes and (v,) not in before.reads]
            turn = replace(
                before,
                name=f"{before.name}+{turn.name}",
                seconds=before.seconds + turn.seconds,
                reads=(*before.reads, *more),
                writes=tuple(dict.fromkeys((*before.writes, *writes))),
            )
        else:
            backward[stage_of[i]].append(len(ops))
        turns.append(Turn((len(ops),), ends=ends))
        ops.append(turn)
    at = tuple({g: number[v] for g, v in values.items() if v in number} for values in seen)
    return OpDag(
        Dag(tuple(ops), tuple(sizes), tuple(turns)),
        at,
        tuple(map(tuple, forward)),
        tuple(map(tuple, backward)),
    )


# One node of autograd each, which makes the gradient of the weight, a tensor of its own, while what it saved
# is there.
DENSE = ("linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "convolution", "embedding")


def relaxed_dag(capture: GraphCapture, seconds: Sequence[float], resident: int = 0) -> Dag:
    """A Dag that asks less than the captured step: by default ``dag_floor`` of it is a bound for the step.

    One turn for each op that makes a value; one for the moment when the forward is over; and one for the
    backward of each op that saves something and on which the loss depends, in reverse order, as autograd's
    engine goes. Every simplification lets more plans in, or makes them cheaper:

    * there are no workspaces, no gradients of values, and backwards take no seconds; all that a backward
      takes is, for products, convolutions and embeddings, the gradient of their largest parameter;
    * parameters, inputs and buffers are always there, at no cost;
    * any value may be kept, whether or not autograd saves it; no ops are joined; random ops may run in any
      order;
    * views are free; what the model returns stays, once made.

    A change in place makes a new value of the same size: exact for what is there between ops, too much while
    the change runs, so that moments in the forward prove nothing. Plans are taken to hold storages whole and
    to run ops whole: one that held a slice of a value, or its bits in another form, is not bounded.

    Args:
        seconds: of each op.
        resident: bytes that are live during the whole step: parameters, gradients, buffers, inputs.
    """
    graph = capture.graph
    found = _values(graph)
    size = [allocated(value, capture.device) for value in found.size]
    ops: list[Op] = []
    starts: list[int] = []
    for i, makes in found.makes.items():
        starts.append(sum(size[v] for v in makes if v in found.leaving))
        ops.append(Op(graph.ops[i].node.name, seconds[i], tuple((v,) for v in found.reads[i]), tuple(makes)))
    ops.append(Op("backward", 0.0, once=True))
    reached = {found.loss}
    for i in reversed(found.makes):
        if reached.isdisjoint(found.makes[i]):
            continue
        reached.update(found.flows[i])
        op = graph.ops[i]
        weight = 0
        if str(op.node.target).removeprefix("aten.").split(".")[0] in DENSE:
            parameters = [graph.groups[g] for g in op.reads if graph.groups[g].producer < 0]
            weight = max(
                (allocated(p.bytes, capture.device) for p in parameters if p.requires_grad), default=0
            )
        needs = tuple((v,) for v in dict.fromkeys(found.saves[i]))
        ops.append(Op(f"{op.node.name}'", 0.0, needs, (), weight, once=True))
    turns = (Turn((o,), starts[o] if o < len(starts) else 0) for o in range(len(ops)))
    sizes = tuple(0 if v in found.leaving else bytes_ for v, bytes_ in enumerate(size))
    return Dag(tuple(ops), sizes, tuple(turns), fixed=resident)


def _inside(
    members: list[int], reads: dict[int, list[int]], makes: dict[int, list[int]], size: list[int]
) -> int:
    """Most bytes that ops joined in one take while they run, above what the last of them makes."""
    *others, last = members
    final = sum(size[v] for v in makes[last])
    most = 0
    for i in members:
        later = {v for j in members if j >= i for v in reads[j]}
        inner = {v for j in others if j <= i for v in makes[j] if v in later or j == i}
        most = max(most, sum(size[v] for v in inner) - (0 if i == last else final))
    return most


def _reads(dag: Dag) -> list[set[int]]:
    return [{v for group in op.reads for v in group} for op in dag.ops]


def _rebuilt(made: OpDag, capture: GraphCapture, stage: int, option: int) -> tuple[set[int], list[list[int]]]:
    """The values that an option of a stage keeps, those from before it too; the ops run again, by part."""
    graph, linear, dag = capture.graph, capture.linear, made.dag
    dropped = capture.dropped[stage][option]
    kept: set[int] = set()
    count, first = 0, linear.cuts[stage]
    for i in range(first, linear.cuts[stage + 1]):
        for pack in graph.ops[i].packs:
            if count not in dropped and pack.group in made.at[i]:
                kept.add(made.at[i][pack.group])
            count += 1
    if not dropped:
        return kept, []
    parts = compile_rebuilds(graph, linear, stage, capture.stages[stage].argument_names, dropped)
    again = []
    for part in parts:
        again_made = {first + i for i in part.rerun}
        for group in graph.groups.values():  # what changes a value in place runs with what makes it
            again_made.update(group.mutated if group.producer in again_made else ())
        again.append([o for o, members in made.forward[stage] if again_made.intersection(members)])
    written = {v for o, _ in made.forward[stage] for v in dag.ops[o].writes}
    reads = _reads(dag)
    return kept | {v for ops in again for o in ops for v in reads[o] - written}, again


def priced(made: OpDag, capture: GraphCapture, chain: Chain) -> Chain:
    """The chain of the capture, its seconds those of the Dag's ops."""

    def cost(ops: Iterable[int]) -> float:
        return sum(made.dag.ops[o].seconds for o in ops)

    stages = [
        replace(
            stage,
            forward=cost(o for o, _ in made.forward[k]),
            backward=cost(made.backward[k]),
            options=tuple(
                replace(option, recompute=sum(map(cost, _rebuilt(made, capture, k, n)[1])))
                for n, option in enumerate(stage.options)
            ),
        )
        for k, stage in enumerate(chain.stages)
    ]
    return replace(chain, stages=tuple(stages))


def translate(made: OpDag, capture: GraphCapture, schedule: Iterable[Action]) -> tuple[DagAction, ...]:  # noqa: C901 - one case per action
    """A plan of the chain as one of the Dag: it runs the same ops, and holds what the plan's words hold.

    A boundary inside a kept stage stays with it; what autograd saved goes after its last reader.
    """
    linear, dag = capture.linear, made.dag
    reads = _reads(dag)
    last_use = dag.last_use
    gradients = {v for ops in made.backward for o in ops for v in dag.ops[o].writes}

    def values(keys: Iterable[int], stage: int) -> set[int]:
        """Of storages, as they are when ``stage`` begins."""
        latest: dict[int, int] = {}
        for seen in made.at[: linear.cuts[stage]]:
            latest.update(seen)
        return {latest[g] for g in keys if g in latest}

    actions: list[DagAction] = []
    there: set[int] = set()
    held: dict[tuple[str, int], set[int]] = {}
    working = -1
    options: dict[int, int] = {}

    def settle(needed: Iterable[int]) -> None:
        """Let go of what nothing holds or needs."""
        gone = there.difference(needed, *held.values())
        actions.extend(Drop(v) for v in sorted(gone))
        there.difference_update(gone)

    def run(ops: Sequence[int], stay: set[int]) -> None:
        for position, o in enumerate(ops):
            actions.append(Run(o))
            there.update(dag.ops[o].writes)
            flows = (
                {v for v in gradients & there if last_use[v] > o} if dag.ops[o].once else gradients & there
            )
            settle(flows.union(stay, *(reads[later] for later in ops[position + 1 :])))

    for action in schedule:
        if isinstance(action, Free):
            held.pop(("x", action.boundary), None)
        elif isinstance(action, Backward):
            i = action.stage
            parts = _rebuilt(made, capture, i, options.pop(i))[1]
            sequence: list[int] = []
            for turn in made.backward[i]:  # each part runs when something that it makes is first read
                for part in [
                    part for part in parts if any(reads[turn].intersection(dag.ops[o].writes) for o in part)
                ]:
                    parts.remove(part)
                    sequence += [o for o in part if o not in sequence]
                sequence.append(turn)
            held.pop(("kept", i))
            if working > i:
                held.pop(("working", 0), None)
            run(sequence, set())
            held.pop(("x", i), None)
            for key in [key for key in held if key[0] == "carried"]:
                first = linear.readers[key[1]][:1] or (-1,)
                if first[0] == i:
                    del held[key]
            settle(v for v in gradients & there if last_use[v] >= (made.backward[i - 1] or (0,))[0] and i)
        else:
            i = action.stage  # type: ignore[union-attr] # a copy to the host is refused by the executor
            if isinstance(action, Checkpoint):
                held["x", i] = values(linear.boundaries[i], i)
            kept = set()
            if isinstance(action, Keep):
                options[i] = action.option
                kept = _rebuilt(made, capture, i, action.option)[0]
                held["kept", i] = set()
            held.pop(("working", 0), None)
            following = values(linear.boundaries[i + 1], i + 1)
            carried = {g: values([g], i + 1) for g in linear.carried[i]}
            run([o for o, _ in made.forward[i]], kept.union(following, *carried.values()))
            if isinstance(action, Keep):
                held["kept", i] = kept | following
            held["working", 0], working = following, i + 1
            held.update({("carried", g): found for g, found in carried.items() if ("carried", g) not in held})
            settle(gradients & there)
    return tuple(actions)
