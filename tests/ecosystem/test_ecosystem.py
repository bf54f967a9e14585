"""Planned models in training loops of other libraries: each example trains like the plain model."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from rematplan import execute, plans_of, trace_of
from tests.shared.helpers import ROOT
from tests.shared.steps import assert_equal, case_of, plan_for, tightest

EXAMPLES = ROOT / "examples"

pytestmark = [
    # Third parties' own affairs: Lightning asks torch for what is deprecated, and warns of few workers and no
    # GPU.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true.*"),
]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def recomputes(model: nn.Module) -> bool:
    """Whether a planned model runs anything again."""
    plans = plans_of(model)
    return bool(plans) and all(plan.predicted_peak < plan.plain.peak for plan in plans[:1])


@pytest.mark.slow
def test_the_trainer_trains_saves_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    train = example("train_with_trainer").train

    def history(trainer: Any) -> list[tuple[float, float]]:
        return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]

    plain = train(str(tmp_path / "plain"), budget=None)
    planned = train(str(tmp_path / "planned"))
    assert recomputes(planned.model)
    assert len(plans_of(planned.model)) == 2, "the last batch of the epoch is smaller"
    assert history(planned) == history(plain)
    assert_equal(state(planned.model), state(plain.model))

    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "planned")
    assert type(loaded) is GPT2LMHeadModel
    assert_equal(state(loaded), state(plain.model))

    resumed = train(str(tmp_path / "resumed"), resume=str(tmp_path / "planned" / "checkpoint-4"))
    assert history(resumed) == history(plain)
    assert_equal(state(resumed.model), state(plain.model))


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.slow
def test_accelerate_trains_and_goes_on_from_a_saved_state(precision: str, tmp_path: Path) -> None:
    train = example("train_with_accelerate").train
    losses, plain = train(budget=None, mixed_precision=precision)
    found, planned = train(mixed_precision=precision, save=str(tmp_path))
    assert recomputes(planned)
    assert found == losses
    assert_equal(state(planned), state(plain))
    found, resumed = train(mixed_precision=precision, resume=str(tmp_path))
    assert found == losses[len(losses) // 2 :]
    assert_equal(state(resumed), state(plain))


@pytest.mark.usefixtures("_fresh_accelerator")
def test_a_forward_that_accelerate_wrapped_leads_to_the_plan_and_never_around_it() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    case = case_of("tiny")
    with accelerator.autocast():
        plan = tightest(plan_for("tiny", "modules"))
    with pytest.raises(ValueError, match=r"execute: the forward of this .* call execute\(\) first"):
        execute(plan, accelerator.prepare(copy.copy(case.model)))

    prepared = accelerator.prepare(execute(plan, case.model, debug=True))
    twin = copy.deepcopy(prepared)  # it is captured again, by the plain forward within the wrapped one
    bare = accelerator.unwrap_model(copy.deepcopy(prepared), keep_fp32_wrapper=False)
    for model in (prepared, twin, bare):
        with accelerator.autocast():  # which the plan is for; without it another one would be made
            case(model)
        assert trace_of(model), "the forward went around the plan"
    assert twin.forward.__self__ is twin


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.slow
def test_lightning_trains_by_the_callback_and_has_its_module_back(precision: str, tmp_path: Path) -> None:
    module = example("train_with_lightning")
    plain = module.train(budget=None, precision=precision)
    planned = module.train(precision=precision, folder=str(tmp_path))
    assert planned.losses == plain.losses
    assert_equal(state(planned), state(plain))
    assert type(planned.model) is GPT2LMHeadModel
    assert "forward" not in planned.model.__dict__
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_equal(checkpoint["state_dict"], state(plain))


def test_the_callback_says_which_module_it_wants() -> None:
    from rematplan.executors.lightning import Rematerialize

    module = example("train_with_lightning").LanguageModel()
    with pytest.raises(ValueError, match="module='net' is no submodule of LanguageModel; pass one of model"):
        Rematerialize("1GiB", module="net").on_fit_start(None, module)  # type: ignore[arg-type] # not reached
    module.second = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"has 2 children with parameters \(model, second\)"):
        Rematerialize("1GiB").on_fit_start(None, module)  # type: ignore[arg-type] # not reached


@pytest.mark.slow
def test_a_diffusion_model_trains_with_its_loss_outside_and_an_average_of_its_weights() -> None:
    train = example("train_diffusion").train
    losses, plain = train(budget=None)
    found, planned = train()
    assert found == losses
    assert losses[-1] < losses[0]
    assert_equal(state(planned), state(plain))


@pytest.mark.slow
def test_a_run_is_the_plain_one_bit_for_bit_resumed_half_way_and_with_flat_memory() -> None:
    from benchmarks.training_run import compare, differences

    plan, *runs = compare(steps=8, every=2)
    assert plan.predicted_overhead > 0
    assert [len(run.peaks) for run in runs] == [4, 4, 2]
    assert differences(plan, *runs) == []
