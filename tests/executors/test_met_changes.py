"""Changes of a planned model that no plan can follow raise errors that name them and the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from rematplan import PlanMismatch, execute
from tests.shared.met import WIDTH, tower
from tests.shared.models import Case
from tests.shared.steps import EITHER_CAPTURE, at_its_tightest


def planned_tower(capture: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = tower(), torch.randn(8, WIDTH)
    planned = execute(at_its_tightest(Case(model, x, (x,), {}), capture), model)
    planned(x).sum().backward()
    return model, planned, x


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "parametrizations": parametrizations.orthogonal,
    "deletion": lambda layer: delattr(layer, "weight"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@EITHER_CAPTURE
@pytest.mark.parametrize("what", REPARAMETRIZED)
@pytest.mark.slow
def test_a_weight_that_something_else_took_the_place_of_is_named(capture: str, what: str) -> None:
    model, planned, x = planned_tower(capture)
    REPARAMETRIZED[what](model.get_submodule("1.0"))
    with pytest.raises(
        PlanMismatch,
        match=r"'1.0.weight' is no parameter .*call solve\(\) and execute\(\)|submodules of '1.0'",
    ):
        planned(x)


@EITHER_CAPTURE
@pytest.mark.parametrize("name", ["2", "1.2"])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.slow
def test_a_removed_submodule_is_named(capture: str, name: str, evaluated: bool) -> None:
    model, planned, x = planned_tower(capture)
    holder, _, key = name.rpartition(".")
    if evaluated:
        model.get_submodule(name).eval()
    del model.get_submodule(holder)[int(key)]  # type: ignore[operator] # a Sequential
    named = repr(name) if evaluated else f"submodules of '{holder or 'the model'}'"
    with pytest.raises(PlanMismatch, match=named):
        planned(x)


@EITHER_CAPTURE
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_transforms_of_torch_func_are_refused_by_name(capture: str, transform: str) -> None:
    model, planned, x = planned_tower(capture)
    calls: dict[str, Callable[[], object]] = {
        "grad": lambda: torch.func.grad(
            lambda weights: torch.func.functional_call(planned, weights, (x,)).sum()
        )(dict(model.named_parameters())),
        "vmap": lambda: torch.vmap(lambda row: planned(row[None]))(x),
        "jvp": lambda: torch.func.jvp(planned, (x,), (x,)),
    }
    with pytest.raises(
        PlanMismatch, match=r"torch.vmap or a transform of torch.func .* transform the plain model"
    ):
        calls[transform]()
    planned(x).sum().backward()


@EITHER_CAPTURE
def test_a_buffer_or_parameter_that_is_new_is_no_matter(capture: str) -> None:
    model, planned, x = planned_tower(capture)
    model.get_submodule("1.0").register_buffer("seen", torch.zeros(1))
    planned(x).sum().backward()
