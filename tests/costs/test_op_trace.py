"""Blocks of equal cost have equal traces; any change of cost changes the trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor, nn

from rematplan.scheduler.costs.op_trace import trace_of_ops


def trace(module: Callable[[Tensor], Tensor], x: Tensor) -> Hashable:
    given = [*module.parameters(), x] if isinstance(module, nn.Module) else [x]
    return trace_of_ops(lambda: module(x), given)[0]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def test_equal_blocks_have_equal_traces_whatever_their_values() -> None:
    assert trace(block(), torch.randn(4, 8)) == trace(block(), torch.randn(4, 8))
    module = block()
    assert trace(module, torch.zeros(4, 8)) == trace(copy.deepcopy(module), torch.ones(4, 8))


def test_the_forwards_result_is_given_with_its_graph() -> None:
    module, x = block(), torch.randn(4, 8)
    _, result = trace_of_ops(lambda: module(x), [x])
    assert torch.equal(result, module(x))
    assert result.grad_fn is not None


def kept(x: Tensor) -> Tensor:
    first = x.sin()
    second = x.cos()
    return first + second


def let_go(x: Tensor) -> Tensor:
    first = x.sin()
    first = x.cos()
    return first + x


class Powers(torch.autograd.Function):
    """Keeps a number that its backward goes by."""

    @staticmethod
    def forward(ctx, x, power):
        ctx.power = power
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.power, None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(lambda x: x.sum(0), lambda x: x.sum(1), id="a plain argument"),
        pytest.param(lambda x: x.sin(), lambda x: x.cos(), id="an op"),
        pytest.param(lambda x: x + x, lambda x: x + x.clone(), id="which storages"),
        pytest.param(kept, let_go, id="what is released in between"),
        pytest.param(lambda x: x.sin(), lambda x: x.detach().sin(), id="the graph"),
        pytest.param(lambda x: (x * 2).t(), lambda x: x * 2, id="strides of what comes out"),
        pytest.param(lambda x: Powers.apply(x, 2), lambda x: Powers.apply(x, 3), id="what a Function keeps"),
        pytest.param(lambda x: x[: int(x[0, 0])], lambda x: x[: 1 + int(x[0, 0])], id="a shape by values"),
    ],
)
def test_what_changes_the_cost_changes_the_trace(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    x = torch.full((4, 4), 2.0, requires_grad=True)
    assert trace(one, x) == trace(one, x)
    assert trace(one, x) != trace(other, x)


def test_shapes_strides_dtypes_and_requires_grad_of_what_is_given_count() -> None:
    traces = [
        trace(torch.sin, x)
        for x in (
            torch.randn(4, 8),
            torch.randn(8, 4),
            torch.randn(8, 4).t(),
            torch.randn(4, 8).double(),
            torch.randn(4, 8, requires_grad=True),
            torch.randn(8, 8)[:4],  # of a larger storage
        )
    ]
    assert len(set(traces)) == len(traces)
