"""Models drawn at random from ops that index, sort, scatter, view and write in place, and their training."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rematplan import CaptureError, HostMemory, Plan, execute, measure_peak, solve
from rematplan.scheduler.core.schedule import COPY_ACTIONS
from tests.shared.helpers import smallest
from tests.shared.models import Case
from tests.shared.steps import Record, assert_equal, loss_of, restored, state, tensors

ROWS, WIDTH = 96, 8  # values are (ROWS, WIDTH, WIDTH), so that transposes and indices fit everywhere
HALF = WIDTH // 2
HOSTS = (
    HostMemory(2**34, 1e12, 1e12),  # so fast that copies beat runs again
    HostMemory(2**34, 1e12, 1e12, asynchronous=True),
    HostMemory(2**34, 2e10, 2e10, asynchronous=True),
    HostMemory(2**17, 1e12, 1e12),
)


class Row(NamedTuple):
    """One op of a drawn model: kind, module, the earlier value and index tensor that it reads, a number."""

    kind: str
    layer: int
    other: int
    order: int
    variant: int


Op = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # of a value, another one, an index tensor, a number


def _written(x: Tensor, y: Tensor, i: Tensor, n: int) -> Tensor:
    """A slice is assigned to, of a tensor made in one of four ways."""
    out = {
        0: x.clone,
        1: lambda: x * 1.5,
        2: lambda: torch.zeros_like(x),
        3: lambda: x.contiguous().add_(1.0),
    }[n]()
    out[:, n : n + HALF] = y[:, :HALF]
    if n % 2:
        out[..., n:HALF] *= 0.5
    return out


def _put(x: Tensor, y: Tensor, i: Tensor, n: int) -> Tensor:
    rows = torch.arange(0, ROWS, n + 1)
    return (x * 1.0).index_put_((rows,), y[rows].tanh(), accumulate=n % 2 == 0)


def _chosen(x: Tensor, y: Tensor, i: Tensor, n: int) -> Tensor:
    best = x.topk(n + 1, dim=2)
    return (x * 0.5).scatter(2, best.indices, best.values * y[..., : n + 1])


def _parted(x: Tensor, y: Tensor, i: Tensor, n: int) -> Tensor:
    one, two = x.split(HALF, dim=2)
    return torch.cat([two * one.sigmoid(), one if n % 2 else y[..., :HALF]], dim=2)


OPS: dict[str, Op] = {
    "gelu": lambda x, y, i, n: F.gelu(x),
    "tanh": lambda x, y, i, n: x.tanh(),
    "dropout": lambda x, y, i, n: F.dropout(x, 0.2),
    "residual": lambda x, y, i, n: x + y,
    "product": lambda x, y, i, n: x * y.sigmoid(),
    "gather": lambda x, y, i, n: x.gather(1 + n % 2, i),
    "sorted": lambda x, y, i, n: x.gather(1, x.argsort(dim=1, descending=n % 2 == 0)),
    "topk": _chosen,
    "scatter_add": lambda x, y, i, n: x.mul(0.5).scatter_add(1 + n % 2, i, y),
    "scatter_add_": lambda x, y, i, n: torch.zeros_like(x).scatter_add_(1 + n % 2, i, x),
    "index_select": lambda x, y, i, n: x.index_select(1, i[0, n]),
    "index_put_": _put,
    "where": lambda x, y, i, n: torch.where(y > 0.1 * n, x, y if n % 2 else x * 0.1),
    "masked_fill": lambda x, y, i, n: x.masked_fill(i > 4 + n, 0.1),
    "masked_fill_": lambda x, y, i, n: (x * 1.1).masked_fill_(y < 0, 0.1),
    "written": _written,
    "parted": _parted,
    "chunks": lambda x, y, i, n: torch.cat(x.chunk(2, dim=1 + n % 2)[::-1], dim=1 + n % 2),
    "cumsum": lambda x, y, i, n: x.cumsum(1 + n % 2) * 0.3,
    "expand": lambda x, y, i, n: (x.mean(1, keepdim=True) if n % 2 else x[:, n : n + 1]).expand_as(x),
    "transpose": lambda x, y, i, n: x.transpose(1, 2),
    "flip": lambda x, y, i, n: x.flip(1 + n % 2),
    "relu_": lambda x, y, i, n: torch.relu_(x + 0.5 if n else x),
    "add_": lambda x, y, i, n: (x * 1.5 if n else x).add_(y),
    "softmax": lambda x, y, i, n: torch.softmax(x, dim=2) * (y if n % 2 else 2.0),
    "einsum": lambda x, y, i, n: torch.einsum("btw,bsw->bts", x, y) * 0.3,
    "attention": lambda x, y, i, n: F.scaled_dot_product_attention(x, y, y if n % 2 else x),
    "half": lambda x, y, i, n: x.bfloat16().tanh().float() + y * 0.1,
}  # fmt: skip # one op a line
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layernorm": lambda: nn.LayerNorm(WIDTH),
    "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
    "conv1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "embedding": lambda: nn.Embedding(WIDTH, WIDTH),
}
KINDS = (*OPS, *LAYERS, *("linear", "written", "where", "gather", "sorted") * 2)


class OpGraph(nn.Module):
    """A line of drawn ops: each reads the latest value and may read any earlier value and index tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.rows: list[Row] = []
        self.layers = nn.ModuleList()
        for made in range(draw.randrange(5, 12)):
            kind = draw.choice(KINDS)
            if kind in LAYERS:
                self.layers.append(LAYERS[kind]())
            other = draw.randrange(made + 1) if draw.random() < 0.4 else max(0, made - 1)
            self.rows.append(
                Row(kind, len(self.layers) - 1, other, draw.randrange(made + 1), draw.randrange(4))
            )
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.sorting = draw.randrange(1, 5)  # every so many values an index tensor is made
        self.returns = draw.choice(("loss",) * 4 + ("value", "view", "index"))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, indices = [self.stem(x)], [x.argsort(dim=2)]
        for made, row in enumerate(self.rows):
            value, index = values[-1], indices[row.order % len(indices)]
            if row.kind == "embedding":
                values.append(self.layers[row.layer](index[..., row.variant]) * value)
            elif row.kind in LAYERS:
                values.append(self.layers[row.layer](value))
            else:
                values.append(OPS[row.kind](value, values[row.other], index, row.variant))
            if made % self.sorting == 0:
                indices.append(values[-1].argsort(dim=1))
        loss: Tensor = self.head(values[-1]).square().mean()
        more = {
            "value": lambda: (values[len(values) // 2],),
            "view": lambda: (values[len(values) // 2][:, 1:HALF],),
            "index": lambda: (indices[-1],),
        }
        return (loss, *more.get(self.returns, tuple)())


def op_graph(seed: int) -> Case:
    """The model of a seed, in train mode, and a batch."""
    torch.manual_seed(seed)
    batch = torch.randn(ROWS, WIDTH, WIDTH)
    return Case(OpGraph(seed).train(), batch, (batch,))


# ---- judged ------------------------------------------------------------------------------------------


class Fault(AssertionError):
    """A plan of a drawn model does not train as it must.

    Attributes:
        kind: "wrong", "over budget" or "over its prediction".
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Trained:
    """A plan of a drawn model that trains bit for bit like it and within its budget.

    Attributes:
        solver: that made its schedule.
        ratio: predicted by measured peak.
        copies: how often the schedule copies between device and host.
        recomputes: whether it runs anything again.
    """

    solver: str
    ratio: float
    copies: int
    recomputes: bool


def judge(seed: int, capture: str = "graph") -> list[Trained] | str:
    """Train the model of the seed by plans of both solvers, each at its smallest budget and a middle one.

    Returns:
        how the plans trained, or why there is none: it was refused, or the plain model raises.

    Raises:
        Fault: another bit, or more than the budget.
    """
    case = op_graph(seed)
    try:
        expected = _step(case, case.model)[0]
    except RuntimeError as error:
        return f"raises: {error}"
    try:
        plan = solve(case.model, "1GiB", sample=case.sample, capture=capture, costs="roofline")
    except CaptureError as error:
        return f"refused: {error}"
    host = HOSTS[seed % len(HOSTS)]
    trained = []
    for solver, parameters in (("two_level", {"host": host}), ("optimal", {})):
        low = smallest(plan.chain, solver, **parameters)
        for share in (0.0, random.Random(seed).choice((0.1, 0.3, 0.5, 0.7))):
            budget = low + int(share * max(0, plan.plain.peak - low))
            trained.append(
                _trained(case, plan.within(budget, solver=solver, parameters=parameters), expected)
            )
    return trained


def _trained(case: Case, plan: Plan, expected: Record) -> Trained:
    where = f"{plan.solver} at {plan.memory_budget} bytes"
    try:
        record, peak = _step(case, execute(plan, case.model, on_new_shape="error"))
        assert_equal(record, expected)
    except Exception as error:
        raise Fault("wrong", f"{where}: {type(error).__name__}: {error}") from error
    if peak > plan.memory_budget:
        raise Fault("over budget", f"{where}: peak {peak}, {peak / plan.memory_budget:.3f} times it")
    if peak > plan.predicted_peak:
        raise Fault("over its prediction", f"{where}: peak {peak}, {peak / plan.predicted_peak:.3f} times it")
    copies = sum(isinstance(action, COPY_ACTIONS) for action in plan.schedule)
    recomputes = max(plan.timeline.runs) > 1 or any(plan.program.kept)
    return Trained(plan.solver, plan.predicted_peak / peak, copies, recomputes)


def _step(case: Case, model: nn.Module) -> tuple[Record, int]:
    """What the second step of training leaves, and its measured peak."""

    def step() -> Any:
        torch.manual_seed(11)
        output = case(model)
        loss_of(output).backward()
        return output

    with restored(case.model):
        step()
        model.zero_grad()
        measured = measure_peak(step, resident=[model, case.args])
        return {**tensors(measured.result), **state(model)}, measured.peak
