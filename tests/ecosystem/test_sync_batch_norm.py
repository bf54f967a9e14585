"""SyncBatchNorm: as batch norm in one process; over gloo torch's own error, with a plan and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rematplan import CaptureError, Plan, execute, solve
from tests.shared.models import Case
from tests.shared.ranks import running
from tests.shared.steps import assert_equal, restored, tightest, train

SAYS = "SyncBatchNorm expected input tensor to be on GPU"


class Net(nn.Module):
    """Convolutions with batch norm, which may be converted."""

    def __init__(self, sync: bool) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            for _ in range(5)
        ]
        inner = nn.Sequential(*layers)
        self.layers = nn.SyncBatchNorm.convert_sync_batchnorm(inner) if sync else inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).square().mean()
        return out


def case(sync: bool) -> Case:
    torch.manual_seed(0)
    model = Net(sync).train()
    batch = torch.randn(8, 8, 16, 16)
    return Case(model, batch, (batch,))


def test_in_one_process_it_trains_as_batch_norm_does_and_its_statistics_change_once() -> None:
    synced = case(sync=True)
    with pytest.raises(CaptureError, match=r"layers\.0\.1.*SyncBatchNorm"):
        solve(synced.model, "1GiB", sample=synced.sample, capture="graph")
    plan = tightest(solve(synced.model, "1GiB", sample=synced.sample))
    assert plan.capture.kind == "modules"
    assert max(plan.timeline.runs) > 1
    plain = case(sync=False)
    expected = train(plain, plain.model)
    with restored(synced.model):
        assert_equal(train(synced, execute(plan, synced.model)), expected)
    assert expected[-1]["buffer layers.0.1.num_batches_tracked"] == 2


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def _errors(path: str) -> tuple[str, str, str]:
    """What the plain model, solve and a plan made before raise on a rank."""
    synced = case(sync=True)
    return (
        _error(lambda: synced(synced.model)),
        _error(lambda: solve(synced.model, "1GiB", sample=synced.sample)),
        _error(lambda: synced(execute(Plan.load(path), synced.model))),
    )


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    with running("gloo") as run:
        yield run


@pytest.mark.slow
def test_over_gloo_it_raises_torch_s_own_error_with_a_plan_and_without(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    synced = case(sync=True)
    path = str(tmp_path / "plan.json")
    tightest(solve(synced.model, "1GiB", sample=synced.sample)).save(path)
    for plain, solved, planned in ranks(_errors, path):
        assert plain.startswith(SAYS)
        assert SAYS in solved
        assert planned == plain
