"""Models of unusual code, and the claim for their plans: the plain step's bits, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rematplan import Plan, execute, measure_peak, solve
from tests.shared.helpers import smallest
from tests.shared.steps import loss_of, tensors

Batch = Callable[[], tuple[Any, ...]]
WIDTH = 16


def tower(blocks: int = 3) -> nn.Sequential:
    """Blocks that are worth running again."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(blocks))
    )


def rows(count: int = 16, trained: bool = False) -> Batch:
    """Batches of rows of the towers' width."""
    return lambda: (torch.randn(count, WIDTH, requires_grad=trained),)


def dense(tensor: Tensor | None) -> Tensor | None:
    """A copy, dense if the tensor is sparse."""
    return None if tensor is None else tensor.detach().to_dense().clone()


def trained(model: nn.Module, run: nn.Module, batch: Batch, steps: int = 5) -> list[Any]:
    """Five steps of SGD: outputs, gradients and layouts; at the end parameters, buffers, random numbers."""
    seen: list[Any] = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        given = batch()
        output = run(*given)
        loss_of(output).backward()
        learnt = [t for t in (*model.parameters(), *given) if isinstance(t, Tensor) and t.requires_grad]
        seen += [*tensors(output).values(), *(dense(t.grad) for t in learnt)]
        seen += [None if t.grad is None else torch.tensor(t.grad.is_sparse) for t in learnt]
        del output
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad.to_dense())
                    parameter.grad = None
    return [*seen, *(dense(t) for t in (*model.parameters(), *model.buffers())), torch.get_rng_state()]


def peak(model: nn.Module, run: nn.Module, given: tuple[Any, ...]) -> int:
    """Measured peak bytes of one step, after another one."""

    def step() -> Any:
        output = run(*given)
        loss_of(output).backward()
        return output

    def clear() -> None:
        for tensor in (*model.parameters(), *(t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))):
            tensor.grad = None

    step()
    clear()
    measured = measure_peak(step, resident=[model, given]).peak
    clear()
    return measured


def check(make: Callable[[], nn.Module], batch: Batch, capture: str = "auto") -> Plan:
    """Plan a model and train it under the smallest budget and one between that and the plain peak.

    Returns:
        the plan under the budget that keeps all.
    """
    torch.manual_seed(0)
    plain = make()
    want = trained(plain, plain, batch)
    torch.manual_seed(0)
    model = make()
    before = {name: dense(value) for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    given = batch()
    plan = solve(model, "1GiB", sample=(given, {}), capture=capture)
    for name, value in model.state_dict().items():
        assert torch.equal(value.to_dense(), before[name]), f"solve moved {name}"  # type: ignore[arg-type]
    low = smallest(plan.chain)
    for budget in dict.fromkeys((low, (low + plan.plain.peak) // 2)):
        torch.manual_seed(0)
        model.load_state_dict(make().state_dict())
        run = execute(plan.within(budget), model)
        for index, (a, b) in enumerate(zip(want, trained(model, run, batch), strict=True)):
            assert (a is None) == (b is None), index
            assert a is None or torch.equal(a, b), f"value {index} under {budget} bytes"
        assert peak(model, run, given) <= budget
    return plan
