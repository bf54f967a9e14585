"""The kinds of capture, by name: what makes each, and what a plan may say of it.

No torch here: a plan is read and judged without it. What needs it is loaded when a model is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler.plan_file import check_blocks, check_graph

if TYPE_CHECKING:
    from scheduler.capture.protocol import Producer
    from scheduler.chain import Chain
    from scheduler.plan import CaptureRecord

__all__ = ["BLOCKS", "KINDS", "Kind"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of capture.

    Attributes:
        producer: loads what captures and prices models so.
        automatic: whether ``capture="auto"`` tries it; kinds are tried in the order of the table.
        runs_code: whether its stages run the user's own code, so that hooks fire and plain values are read at
            every run.
        options: whether its stages may be kept in part.
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
    options: bool = False
    copies: bool = False
    stages: str = ""
    lengths: Callable[[int, CaptureRecord], Mapping[str, tuple[int, ...]]] = lambda stages, record: {}
    check: Callable[[Chain, CaptureRecord], None] = lambda chain, record: None


def _graph_producer() -> Producer:
    from scheduler.costs.graph_producer import GraphProducer

    return GraphProducer()


def _block_producer() -> Producer:
    from scheduler.costs.block_producer import BlockProducer

    return BlockProducer()


BLOCKS = "modules"  # the kind that a list of modules is captured as

KINDS: dict[str, Kind] = {
    "graph": Kind(
        _graph_producer,
        automatic=True,
        options=True,
        copies=True,
        lengths=lambda stages, _: {
            "cuts": (stages - 1,),
            "begins": (0, stages - 1),
            **dict.fromkeys(("dropped", "rerun", "gaps", "ops"), (0, stages)),
        },
        check=check_graph,
    ),
    BLOCKS: Kind(
        _block_producer,
        automatic=True,
        runs_code=True,
        stages="the model's own blocks, and the code between them",
        lengths=lambda _, record: {"fed": (0, len(record.stages))},
        check=check_blocks,
    ),
}
