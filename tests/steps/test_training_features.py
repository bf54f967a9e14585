"""Features of training scripts around a planned model work as with the plain one, bit for bit."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rematplan import CaptureError, PlanMismatch, execute, plans_of, solve
from tests.shared.models import Case, FeedForward, Stack, stack
from tests.shared.steps import (
    EITHER_CAPTURE,
    OVERLAPPING,
    Record,
    assert_equal,
    assert_same,
    loss_of,
    planned,
    restored,
    state,
    tightest,
    train,
    within,
)

# ---- several models, several threads -----------------------------------------------------------------


@EITHER_CAPTURE
def test_two_models_train_in_two_threads(capture: str) -> None:
    cases = [stack(seed) for seed in (1, 2)]
    # Random numbers are the process's own: dropout would depend on how the threads take turns.
    for module in (module for case in cases for module in case.model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = []
    for case in cases:
        with restored(case.model):
            expected.append(train(case, case.model, steps=4))
    models = [planned(case, capture) for case in cases]
    found: dict[int, list[Record]] = {}

    def run(number: int) -> None:
        found[number] = train(cases[number], models[number], steps=4)

    with restored(cases[0].model), restored(cases[1].model):
        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number in (0, 1):
        without_generators(found[number])
        without_generators(expected[number])
        assert_equal(found[number], expected[number])


def without_generators(records: list[Record]) -> None:
    for record in records:
        record.pop("rng")


class Outer(nn.Module):
    """A layer, and another model after it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.inside(self.first(x).tanh())
        return loss


@EITHER_CAPTURE
def test_a_planned_model_inside_a_plain_one(capture: str) -> None:
    case = stack()
    # What comes out of the layer before requires grad.
    inner_plan = solve(case.model, "1GiB", sample=case.args[0].clone().requires_grad_(), capture=capture)
    torch.manual_seed(5)
    plain = Outer(case.model).train()
    outer = Outer(execute(tightest(inner_plan), case.model)).train()
    outer.first = plain.first
    around = Case(plain, case.sample, case.args)
    with restored(plain):
        expected = train(around, plain)
    with restored(plain):
        assert_equal(train(around, outer), expected)


@EITHER_CAPTURE
def test_a_planned_model_inside_a_planned_one(capture: str) -> None:
    case = stack()
    inner_plan = solve(case.model, "1GiB", sample=case.args[0].clone().requires_grad_(), capture=capture)
    torch.manual_seed(5)
    plain = Outer(case.model).train()
    nested = Outer(execute(tightest(inner_plan), case.model)).train()
    nested.first = plain.first
    around = Case(nested, case.sample, case.args)
    outer_plan = solve(nested, "1GiB", sample=case.sample)
    outer = execute(tightest(outer_plan), nested)
    with restored(plain):
        expected = train(Case(plain, case.sample, case.args), plain)
    with restored(plain):
        found = train(around, outer)
    assert_equal(found, expected)


# ---- frozen, adapted, normalised ---------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen linear layer with a trainable low-rank change."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.up.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapted() -> Case:
    case = stack()
    case.model.requires_grad_(False)
    for block in list(case.model.blocks)[3:]:  # type: ignore[arg-type] # a ModuleList
        block.up = Lora(block.up)
    return case


@EITHER_CAPTURE
def test_adapters_get_gradients_and_the_frozen_prefix_runs_once(capture: str) -> None:
    case = adapted()
    plan = tightest(solve(case.model, "1GiB", sample=case.sample, capture=capture))
    model = execute(plan, case.model)
    with restored(case.model):
        expected = train(case, case.model)
    with restored(case.model):
        assert_equal(train(case, model), expected)
    runs = {"0": 0, "3": 0}

    def count(name: str, *_: object) -> None:
        runs[name] += 1

    if capture == "modules":  # hooks inside of blocks see every run; as a graph the prefix is one stage
        hooks = [
            within(case.model, f"blocks.{n}.norm").register_forward_pre_hook(partial(count, n)) for n in runs
        ]
        case(model).backward()
        for hook in hooks:
            hook.remove()
        case.model.zero_grad()
        assert runs["0"] == 1 < runs["3"]
    else:
        assert plan.chain.stages[0].recomputable is False
        assert plan.timeline.runs[0] == 1


@EITHER_CAPTURE
def test_spectral_norm_s_vectors_move_once_a_step(capture: str) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Tanh()) for _ in range(5)
    ]
    model = nn.Sequential(*layers, nn.Linear(16, 1)).train()
    batch = torch.randn(512, 16)  # a random-number state of a block weighs as much as 79 rows
    case = Case(model, batch, (batch,))
    trained = planned(case, capture)
    with restored(model):
        expected = train(case, model)
    with restored(model):
        assert_equal(train(case, trained), expected)


@EITHER_CAPTURE
def test_a_grad_scaler_scales_unscales_and_skips_as_with_the_plain_model(capture: str) -> None:
    case = stack()
    trained = planned(case, capture)

    def procedure(model: nn.Module) -> Record:
        torch.manual_seed(3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scales = []
        for step in range(5):
            loss = case(model) * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return {"scales": torch.tensor(scales), **state(model)}

    assert_same(case.model, trained, procedure)


@OVERLAPPING
@EITHER_CAPTURE
def test_two_losses_one_after_the_other_and_an_output_that_the_user_keeps(capture: str) -> None:
    @dataclass
    class Result:
        loss: Tensor
        hidden: Tensor
        note: str
        nothing: None = None

    class Two(Stack):
        def forward(self, x: Tensor) -> Result:  # type: ignore[override] # another model
            for block in self.blocks:
                x = block(x)
            return Result(self.head(x).square().mean(), x, "two losses")

    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    model = Two().train()
    torch.utils._pytree.register_dataclass(Result)
    case = Case(model, batch, (batch,))
    trained = planned(case, capture)

    def procedure(one: nn.Module) -> Record:
        result = one(batch)
        assert (result.note, result.nothing) == ("two losses", None)
        result.loss.backward(retain_graph=True)
        result.hidden.sum().backward()
        return {"hidden": result.hidden.detach().clone(), "loss": result.loss.detach()}

    assert_same(model, trained, procedure)


# ---- what requires grad ------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is the head's, too, and is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.head(self.blocks(self.embedding(ids))).square().mean()
        return loss


@EITHER_CAPTURE
def test_a_frozen_weight_that_is_tied_is_as_it_was(capture: str) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 32, (8, 6))
    model.embedding.weight.requires_grad_(False)
    plan = tightest(solve(model, "1GiB", sample=ids, capture=capture))
    found = execute(plan, model, on_new_shape="error")
    found(ids).backward()
    model.embedding.weight.requires_grad_(True)
    with pytest.raises(PlanMismatch, match=r"embedding\.weight"):
        found(ids)


@EITHER_CAPTURE
def test_a_loss_of_a_model_that_is_frozen_for_a_moment_is_the_plain_one(capture: str) -> None:
    case = stack()
    found = execute(tightest(solve(case.model, "1GiB", sample=case.sample, capture=capture)), case.model)
    case.model.requires_grad_(False)
    torch.manual_seed(1)
    expected = case(case.model)
    torch.manual_seed(1)
    assert torch.equal(case(found), expected)
    case.model.requires_grad_(True)
    loss_of(case(found)).backward()
    assert len(plans_of(found)) == 1


@EITHER_CAPTURE
def test_a_net_that_is_frozen_all_along_gives_features_of_a_target_plainly(capture: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4))).requires_grad_(
        False
    )
    made, target = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    found = execute(tightest(solve(net, "1GiB", sample=made, capture=capture)), net)
    expected = torch.autograd.grad((net(made) - net(target)).square().mean(), made)
    (got,) = torch.autograd.grad((found(made) - found(target)).square().mean(), made)
    assert torch.equal(got, expected[0])


class Decorated(nn.Module):
    """A forward that is one region of autocast: as a graph, one op."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(6)
        )

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_where_a_graph_cannot_be_cut_blocks_are_taken() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    plan = solve(Decorated(), "1GiB", sample=batch)
    assert plan.capture.kind == "modules"
    assert "a graph of one stage" in plan.capture.reason
    assert len(solve(Decorated(), "1GiB", sample=batch, capture="graph").chain) == 1


# torch 2.11's checkpoint, which is left half-way, finds its hooks left already.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_blocks_under_torchs_checkpoint_are_refused_with_what_to_do() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(FeedForward(16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    with pytest.raises(CaptureError, match="leave that to the plan"):
        solve(Checkpointed(), "1GiB", sample=torch.randn(4, 16), capture="modules")
