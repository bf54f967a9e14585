"""The kinds of capture, by name: what makes each, and what a plan may say of it.

Torch-free, so that a plan is read and judged without torch; a producer is loaded when a model is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rematplan.scheduler.core.json_data import refused

if TYPE_CHECKING:
    from rematplan.scheduler.capture.protocol import Producer
    from rematplan.scheduler.core.chain import Chain
    from rematplan.scheduler.plan.record import CaptureRecord

__all__ = ["BLOCKS", "COMPILED", "KINDS", "Kind"]

MOST_BACK = 100  # blocks that a value may pass by in a plan file; captures stop at ``MOST_PASSED``


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of capture.

    Attributes:
        producer: loads what captures and prices models so.
        automatic: whether ``capture="auto"`` tries it; kinds are tried in the order of the table.
        runs_code: whether its stages run the user's own code, so that hooks fire and plain values are read at
            every run.
        options: fields of its records that have an entry for each option of each stage, if stages may have
            several.
        copies: whether what autograd saves of its stages can be copied to the host.
        stages: what the stages are, for the cost table; "" where the table says why each begins where it
            does.
        lengths: (stages, record) -> how many entries the fields of a record that are this kind's own may
            have; others have none.
        check: refuses a record that does not fit its chain, with a ValueError.
    """

    producer: Callable[[], Producer]
    automatic: bool = False
    runs_code: bool = False
    options: tuple[str, ...] = ()
    copies: bool = False
    stages: str = ""
    lengths: Callable[[int, CaptureRecord], Mapping[str, tuple[int, ...]]] = lambda stages, record: {}
    check: Callable[[Chain, CaptureRecord], None] = lambda chain, record: None


def _check_graph(_: Chain, record: CaptureRecord) -> None:
    """Refuse a graph whose cuts, or ops that run again, are not places of ops, or that names modules.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    if any(after <= before for before, after in pairwise((0, *record.cuts))):
        raise refused("capture.cuts", record.cuts, "places of ops, ascending, the first above 0")
    if record.stages:
        raise refused("capture.stages", record.stages, "none: the stages of a graph are no modules")
    if any(
        op >= len(ops)
        for options, ops in zip(record.rerun, record.ops, strict=False)
        for ran in options
        for op in ran
    ):
        raise refused("capture.rerun", record.rerun, "places of ops in their stages, as capture.ops has them")


def _check_compiled(chain: Chain, record: CaptureRecord) -> None:
    """Refuse a compiled graph as a graph, and shares that no partition has.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    _check_graph(chain, record)
    for i, shares in enumerate(record.shares):
        if not all(0 < share <= 1 for share in shares):
            raise refused(f"capture.shares[{i}]", shares, "shares above 0 and at most 1")


def _check_blocks(chain: Chain, record: CaptureRecord) -> None:
    """Refuse blocks that are kept in part, or fed by others than blocks before them.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    for i, stage in enumerate(chain.stages):
        if len(stage.options) != 1:
            raise ValueError(
                f"chain.stages[{i}].options has {len(stage.options)} entries, expected 1: a module is kept whole or not at all"
            )
    if not record.stages:
        raise refused("capture.stages", record.stages, "the names of the modules that are stages")
    begin = 0  # the first block since the code between them was last a stage
    for i, fed in enumerate(record.fed):
        begin = begin if fed else i
        for row in fed:
            back = row[2] if len(row) == 3 else 1
            if not 1 <= back <= min(i - begin, MOST_BACK):
                raise refused(
                    f"capture.fed[{i}]", fed, f"outputs of 1 to {min(i - begin, MOST_BACK)} blocks back"
                )


def _graph_producer() -> Producer:
    from rematplan.scheduler.costs.graph_producer import GraphProducer

    return GraphProducer()


def _compiled_producer() -> Producer:
    from rematplan.scheduler.costs.graph_producer import CompiledProducer

    return CompiledProducer()


def _block_producer() -> Producer:
    from rematplan.scheduler.costs.block_producer import BlockProducer

    return BlockProducer()


BLOCKS = "modules"  # the kind that a list of modules is captured as
COMPILED = "compiled"  # the kind that ``backend="inductor"`` captures graphs as

KINDS: dict[str, Kind] = {
    "graph": Kind(
        _graph_producer,
        automatic=True,
        options=("dropped", "rerun"),
        copies=True,
        lengths=lambda stages, _: {
            "cuts": (stages - 1,),
            "begins": (0, stages - 1),
            **dict.fromkeys(("dropped", "rerun", "gaps", "ops"), (0, stages)),
        },
        check=_check_graph,
    ),
    COMPILED: Kind(
        _compiled_producer,
        options=("shares",),
        lengths=lambda stages, _: {"cuts": (stages - 1,), "begins": (0, stages - 1), "shares": (stages,)},
        check=_check_compiled,
    ),
    BLOCKS: Kind(
        _block_producer,
        automatic=True,
        runs_code=True,
        stages="the model's own blocks, and the code between them",
        lengths=lambda _, record: {"fed": (0, len(record.stages))},
        check=_check_blocks,
    ),
}
