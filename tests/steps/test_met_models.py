"""Models of unusual code train by plans as plainly: sparse tensors, hooked weights, torch.vmap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rematplan import CaptureError, PlanMismatch, execute, solve
from tests.shared.met import WIDTH, Batch, check, rows, tower
from tests.shared.steps import EITHER_CAPTURE

SPARSE_CSR = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
OLD_NORMS = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def ids(rows_of_table: int, *shape: int) -> Batch:
    return lambda: (torch.randint(0, rows_of_table, shape),)


class Looked(nn.Module):
    """A sparse embedding of few rows before a tower, so that its gradient is larger than the table."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.tower = table, tower()

    def forward(self, index: Tensor) -> Tensor:
        result: Tensor = self.tower(self.table(index)).square().mean()
        return result


class LookedLate(nn.Module):
    """The gradient of the embedding comes first in the backward, and stays while the tower is reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.table = tower(), nn.Embedding(8, 64, sparse=True)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        result: Tensor = self.tower(x).square().mean() * self.table(index).mean(0).sum()
        return result


@EITHER_CAPTURE
def test_sparse_gradients_of_an_embedding_are_planned(capture: str) -> None:
    check(lambda: Looked(nn.Embedding(50, WIDTH, sparse=True)), ids(50, 16), capture)


def test_sparse_gradients_of_a_bag_are_planned() -> None:
    check(lambda: Looked(nn.EmbeddingBag(50, WIDTH, sparse=True)), ids(50, 16, 4))


@EITHER_CAPTURE
def test_a_sparse_gradient_counts_by_its_elements_not_by_the_table(capture: str) -> None:
    plan = check(LookedLate, lambda: (torch.randn(16, WIDTH), torch.randint(0, 8, (256,))), capture)
    elements = 256 * (8 + 64 * 4)
    assert max(stage.grad for stage in plan.chain.stages) >= elements > 8 * 64 * 4


class Propagated(nn.Module):
    """Layers of a graph network over a sparse adjacency."""

    def __init__(self, adjacency: Tensor | None = None) -> None:
        super().__init__()
        self.first, self.tower = nn.Linear(WIDTH, WIDTH), tower()
        self.adjacency: Tensor | None
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        adjacency = self.adjacency if adjacency is None else adjacency
        assert adjacency is not None
        result: Tensor = self.tower(torch.sparse.mm(adjacency, self.first(x))).square().mean()
        return result


def edges(seed: int = 5) -> Tensor:
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
    return values.masked_fill(values.abs() < 1, 0.0)


@SPARSE_CSR
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_are_planned_as_blocks(layout: torch.layout) -> None:
    plan = check(Propagated, lambda: (torch.randn(16, WIDTH), edges().to_sparse(layout=layout)))
    assert plan.capture.kind == "modules"
    assert "sparse" in plan.capture.reason


@SPARSE_CSR
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_planned_as_blocks(layout: torch.layout) -> None:
    plan = check(lambda: Propagated(edges().to_sparse(layout=layout)), rows())
    assert plan.capture.kind == "modules"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_one_plan_serves_sparse_inputs_of_about_as_many_elements_and_another_one_more() -> None:
    torch.manual_seed(0)
    model = Propagated()
    x = torch.randn(16, WIDTH)

    def some(count: int) -> Tensor:
        index = torch.stack([torch.arange(count) // 16, torch.arange(count) % 16])
        return torch.sparse_coo_tensor(index, torch.ones(count), (16, 16)).coalesce()

    planned = execute(
        solve(model, "1GiB", sample=(x, some(75)), capture="modules"), model, on_new_shape="error"
    )
    planned(x, some(80)).backward()
    with pytest.raises(PlanMismatch, match="up to 160 elements"):
        planned(x, some(150))


class Mapped(nn.Module):
    """A block that maps its layer over the rows."""

    def __init__(self, randomness: str) -> None:
        super().__init__()
        self.layer, self.randomness = nn.Linear(WIDTH, WIDTH), randomness

    def forward(self, x: Tensor) -> Tensor:
        def row(each: Tensor) -> Tensor:
            return F.dropout(torch.tanh(self.layer(each)), 0.2 if self.randomness == "different" else 0.0)

        result: Tensor = torch.vmap(row, randomness=self.randomness)(x)
        return result


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_vmap_within_blocks_is_planned_as_blocks(randomness: str) -> None:
    plan = check(lambda: nn.Sequential(*(Mapped(randomness) for _ in range(4))), rows())
    assert "torch.vmap" in plan.capture.reason


class Counted(nn.Module):
    """An integer that the forward counts up and divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()
        self.n: Tensor
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        result: Tensor = (self.tower(x / self.n) / self.n).square().mean()
        return result


def test_an_integer_buffer_that_is_counted_up_and_divided_by_is_planned() -> None:
    check(Counted, rows())


class Volume(nn.Module):
    """Convolutions and instance norms of volumes, channels last."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU()) for _ in "ab"]
        self.layers = nn.Sequential(*(layer for each in layers for layer in each))
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload] # torch's stub has four dimensions

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x).square().mean()
        return result


@EITHER_CAPTURE
def test_volumes_with_channels_last_are_planned(capture: str) -> None:
    check(Volume, lambda: (torch.randn(2, 4, 5, 5, 5).to(memory_format=torch.channels_last_3d),), capture)


def normed(wrap: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    """Makes a tower whose first layers have weights that ``wrap`` makes anew at each call."""

    def make() -> nn.Module:
        model = tower()
        for block in model:
            wrap(block.get_submodule("0"))  # type: ignore[arg-type] # it is a Linear
        return model

    return make


def pruned(layer: nn.Linear) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@OLD_NORMS
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, pruned])
def test_weights_that_pre_hooks_make_are_made_within_their_block(
    wrap: Callable[[nn.Linear], nn.Module],
) -> None:
    plan = check(normed(wrap), rows())
    assert {"0.0", "1.0", "2.0"} <= set(plan.capture.stages)


class Frozen(nn.Module):
    """A net that is not trained: its input is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x).square().mean()
        return result


@EITHER_CAPTURE
def test_a_frozen_net_is_planned_for_an_input_that_requires_grad(capture: str) -> None:
    check(lambda: Frozen(tower()), rows(trained=True), capture)


@EITHER_CAPTURE
def test_a_net_without_parameters_is_planned_for_an_input_that_requires_grad(capture: str) -> None:
    layers = [nn.GELU(), nn.Tanh(), nn.Softmax(-1)]
    check(lambda: Frozen(nn.Sequential(*layers, *layers[:2])), rows(trained=True), capture)


def test_a_frozen_net_on_an_input_that_needs_no_gradient_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match="no parameter of the model requires grad, nor does a tensor of the sample"
    ):
        solve(Frozen(tower()), "1GiB", sample=torch.randn(4, WIDTH))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_by_name_before_anything_runs(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=layout)
    model = tower()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="argument leaf 0 of the sample is a nested tensor"):
        solve(model, "1GiB", sample=nested)


def test_a_planned_forward_refuses_a_nested_tensor() -> None:
    model = tower()
    planned = execute(solve(model, "1GiB", sample=torch.randn(4, WIDTH), capture="modules"), model)
    nested = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=torch.jagged)
    with pytest.raises(PlanMismatch, match="an argument is a nested tensor"):
        planned(nested)


def test_complex_parameters_are_planned() -> None:
    check(
        lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.cfloat) for _ in range(4)), Modulus()),
        lambda: (torch.randn(8, WIDTH, dtype=torch.cfloat),),
    )


class Modulus(nn.Module):
    """A loss of complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().square().mean()


def test_an_empty_batch_is_planned() -> None:
    check(tower, rows(0))


class Branching(nn.Module):
    """A branch on data, by torch.cond, and statistics in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.other = tower(), tower(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = float(self.other(x).sum()) * 0 + 1
        y = torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.tower(x),))
        result: Tensor = y.square().mean() * scale
        return result


@pytest.mark.slow  # torch.cond loads the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_cond_and_inference_mode_in_the_forward_are_planned_as_blocks() -> None:
    assert check(Branching, rows()).capture.kind == "modules"


@dataclasses.dataclass
class Output:
    """What a model may return."""

    loss: Tensor
    more: Any = None


class Returning(nn.Module):
    """A loss in a dataclass, beside None and nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()

    def forward(self, x: Tensor) -> Output:
        y = self.tower(x)
        return Output(y.square().mean(), {"more": [None, (y, "text", 3)]})


def test_a_dataclass_with_none_in_it_may_be_returned() -> None:
    check(Returning, rows())


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_module_called_within_a_transform_is_no_block() -> None:
    class Tangent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower()

        def forward(self, x: Tensor) -> Tensor:
            value, tangent, *_ = torch.func.jvp(self.tower, (x,), (torch.ones_like(x),))
            result: Tensor = (value * tangent).mean()
            return result

    with pytest.raises(CaptureError, match=r"runs within torch\.vmap, another transform"):
        solve(Tangent(), "1GiB", sample=torch.randn(4, WIDTH))
