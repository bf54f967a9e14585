"""Run random training loops plainly and by a plan, and compare them after every step."""

from __future__ import annotations

import gc
import logging
import random
import re
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rematplan import CaptureError, PlanMismatch, ReplayError, execute, measure_peak, solve
from rematplan.scheduler.core.errors import InfeasibleBudget
from tests.shared.helpers import smallest
from tests.shared.training_loops import Loop, tidy
from tests.shared.training_models import Recipe, Step, build

OURS = (CaptureError, InfeasibleBudget, PlanMismatch, ReplayError)
Contents = dict[str, Any]


# ---- compared ----------------------------------------------------------------------------------------


def contents(loop: Loop) -> Contents:
    """Copies of all that a step may change: tensors, gradients, generators, attributes and their contents."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 # of the global one, which models draw from
    found: Contents = {
        "torch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
        "NumPy's generator": (numpy[1].tobytes(), *numpy[2:]),
    }
    of_model(loop.handle, found)
    for number, leaf in enumerate(loop.leaves()):
        _flatten(f"leaf {number}", leaf, found)
        _flatten(f"gradient of leaf {number}", leaf.grad, found)
    return found


def of_model(model: nn.Module, found: Contents) -> Contents:
    """The model's part of ``contents``."""
    for name, parameter in model.named_parameters():
        _flatten(f"gradient of {name}", parameter.grad, found)
    for name, parameter in model.named_parameters():
        _flatten(f"parameter {name}", parameter, found)
    for name, buffer in model.named_buffers():
        _flatten(f"buffer {name}", buffer, found)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                _flatten(f"attribute {name}.{key}".replace(" .", " "), value, found)
    return found


def _flatten(name: str, value: Any, found: Contents, depth: int = 0) -> None:
    """Add what a value consists of."""
    if isinstance(value, Tensor):
        # Whether it has a history is seen too: one that is stale would be reversed a second time.
        found[name] = value.detach().clone()
        found[f"{name}: requires grad"] = (value.requires_grad, value.is_leaf)
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif isinstance(value, np.ndarray):
        found[name] = value.tolist()
    elif isinstance(value, dict):
        found[name] = [*map(str, value)]
        for key, entry in value.items():
            _flatten(f"{name}[{key}]", entry, found, depth + 1)
    elif isinstance(value, (list, tuple, deque)):
        found[name] = (type(value).__name__, len(value))
        for number, entry in enumerate(value):
            _flatten(f"{name}[{number}]", entry, found, depth + 1)
    elif isinstance(value, FunctionType):
        found[name] = value.__qualname__
        for number, cell in enumerate(value.__closure__ or ()):
            _flatten(f"{name}, closure {number}", cell.cell_contents, found, depth + 1)
    elif isinstance(value, (int, float, str, set, type(None), torch.dtype)):
        found[name] = value if not isinstance(value, set) else sorted(value)
    else:
        found[name] = type(value).__name__
        if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and depth < 4:
            _flatten(name + ".", vars(value), found, depth + 1)


def difference(got: Contents, expected: Contents) -> str | None:
    """The first thing that differs."""
    for name, want in expected.items():
        if name not in got:
            return f"{name} is missing"
        have = got[name]
        if isinstance(want, Tensor) and isinstance(have, Tensor):
            if have.dtype != want.dtype or have.shape != want.shape:
                return f"{name} is {have.dtype} {[*have.shape]}, expected {want.dtype} {[*want.shape]}"
            if not torch.equal(have, want) and not torch.allclose(have, want, rtol=0, atol=0, equal_nan=True):
                return f"{name} differs by up to {(have.double() - want.double()).abs().max():.3g}"
        elif isinstance(want, Tensor) or isinstance(have, Tensor) or have != want:
            return f"{name} is {_short(have)}, expected {_short(want)}"
    more = [name for name in got if name not in expected]
    return f"{more[0]} is there, and should not be" if more else None


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:60]


def objects(model: nn.Module) -> list[tuple[str, Any]]:
    """The very objects that a model has: parameters, buffers and attributes."""
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, module in model.named_modules():
        found += [
            (f"{name}.{key}", value)
            for key, value in vars(module).items()
            if not key.startswith("_") and not isinstance(value, (int, float, str, tuple))
        ]
    return found


# ---- judged ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a recipe went.

    Attributes:
        kind: "graph" or "modules" (planned, and equal), "refused", "raises" as the plain loop does, "wrong"
            (something differs), "crash" (an error neither of the plain loop nor ours), or "over" (budget,
            without a word).
        reason: what differs, or the error.
        said: warnings and lines of the log.
        where: the traceback of a crash.
    """

    kind: str
    reason: str = ""
    said: tuple[str, ...] = ()
    where: str = field(default="", compare=False, repr=False)

    @property
    def bad(self) -> bool:
        """Whether it should not be."""
        return self.kind in ("wrong", "crash", "over")


@dataclass
class Run:
    """Records of the steps, and how the loop ended."""

    loop: Loop
    records: list[Contents]
    error: Exception | None = None


def run(
    recipe: Recipe, called: nn.Module, handle: nn.Module, halfway: Callable[[Loop], None] | None = None
) -> Run:
    """Train.

    Args:
        halfway: called in the middle.
    """
    loop = Loop(recipe, called, handle)
    found = Run(loop, [])
    loop.begin()
    for number in range(len(recipe.steps)):
        try:
            if halfway is not None and number == len(recipe.steps) // 2:
                halfway(loop)
            given = loop.step()
        except Exception as error:  # noqa: BLE001 # whatever torch raises, the planned loop must too
            found.error = error
            break
        record: Contents = {}
        for name, value in given.items():
            _flatten(name, value, record)
        found.records.append(record | contents(loop))
    return found


def judge(recipe: Recipe, *, measured: bool = False) -> Verdict:
    """Train plainly and by a plan, and compare after each step.

    Args:
        measured: whether the peak of a further step is measured, too.
    """
    with tidy(), listening() as said:
        verdict = _judge(recipe, measured, said)
    return replace(verdict, said=said())


def _judge(recipe: Recipe, measured: bool, said: Callable[[], tuple[str, ...]]) -> Verdict:  # noqa: C901 - one case per verdict
    model = build(recipe)
    expected = run(recipe, model, model)
    model = build(recipe)
    torch.manual_seed(recipe.seed + 2)
    loop = Loop(recipe, model, model)
    sample = loop.batch()
    before, there = contents(loop), objects(model)
    try:
        plan = solve(model, "1GiB", sample=sample, capture=recipe.capture, costs="roofline")
    except Exception as error:  # noqa: BLE001
        if "rejects the sample" in str(error) and expected.records:
            return Verdict("wrong", f"the plain model takes the sample: {_short(error)}")
        return _failed(error, None)
    changed = difference(contents(loop), before)
    if changed is not None:
        return Verdict("wrong", f"after solve: {changed}")
    for (name, one), (other, two) in zip(there, objects(model), strict=True):
        if one is not two or name != other:
            return Verdict("wrong", f"after solve: {name} is another object")
    low = smallest(plan.chain)
    plans = [plan.within(low + int(share * max(0, plan.plain.peak - low))) for share in recipe.shares]

    def follow_the_other(loop: Loop) -> None:
        loop.called = execute(plans[1], loop.called)
        loop.handle = loop.called if recipe.handle == "planned" else loop.handle

    try:
        planned = execute(plans[0], model)
    except Exception as error:  # noqa: BLE001
        return _failed(error, None)
    handle = planned if recipe.handle == "planned" else model
    found = run(recipe, planned, handle, follow_the_other if len(plans) > 1 else None)
    for number, (have, want) in enumerate(zip(found.records, expected.records, strict=False)):
        differs = difference(have, want)
        if differs is not None:
            return Verdict("wrong", f"step {number}: {differs}")
    if len(found.records) > len(expected.records):
        return Verdict("wrong", f"the plain loop raises, the planned one does not: {_short(expected.error)}")
    if found.error is not None:
        return _failed(
            found.error,
            expected.error,
            f"step {len(found.records)}: ",
            len(expected.records) == len(found.records),
        )
    if measured:
        over = _over(found.loop, plans[-1].memory_budget, said)
        if over is not None:
            return Verdict("over", over)
    return Verdict(plan.capture.kind)


def _failed(error: Exception, plain: Exception | None, where: str = "", there: bool = False) -> Verdict:
    """An error of the planned loop, beside that of the plain one at the same place."""
    message = f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
    if plain is not None and there and type(error) is type(plain):
        return Verdict("raises", message)
    ours = isinstance(error, OURS) or (isinstance(error, ValueError) and str(error).startswith("solve"))
    if ours or "modified by an inplace operation" in str(error):
        return Verdict("refused", message)
    return Verdict("crash", message, where="".join(traceback.format_exception(error)))


def _over(loop: Loop, budget: int, said: Callable[[], tuple[str, ...]]) -> str | None:
    """By how much a further step is over the budget, if nothing was said about it."""
    loop.number = len(loop.recipe.steps)
    loop.change()
    loop.x = loop.batch()
    loop.optimizer.zero_grad()
    loop.lesson()  # this one may plan, which the next cannot: bytes are counted
    loop.optimizer.zero_grad()
    loop.x.grad = None
    loop.change()
    gc.collect()
    trained = [loop.called, loop.x, loop.leaves()]
    kept = _kept(loop)
    peak = measure_peak(loop.lesson, resident=trained).peak
    kept = max(kept, _kept(loop))
    if peak <= budget + kept or any(map(WORD.search, said())):
        return None
    return (
        f"peak {peak} over budget {budget} and {kept} of the loop's own state: {peak / (budget + kept):.3f}"
    )


WORD = re.compile(
    r"PeakWarning|over (its|the) budget|above the budget|more than the budget|without a plan|run plainly"
)


def _kept(loop: Loop) -> int:
    """Bytes of tensors that attributes hold, which are the user's own."""
    found: Contents = {}
    of_model(loop.handle, found)
    names = ("attribute",)
    return sum(t.nbytes for name, t in found.items() if isinstance(t, Tensor) and name.startswith(names))


@contextmanager
def listening() -> Iterator[Callable[[], tuple[str, ...]]]:
    """What has been said since: lines of the log, and warnings."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("rematplan"), Listener(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield lambda: (*lines, *(f"{w.category.__name__}: {w.message}" for w in caught))
        finally:
            logger.removeHandler(listener)
            logger.propagate = propagate


# ---- made smaller ------------------------------------------------------------------------------------


def shrunk(
    recipe: Recipe, verdict: Verdict, judged: Callable[[Recipe], Verdict] = judge
) -> tuple[Recipe, Verdict]:
    """A simpler recipe that goes wrong in the same way: what is left is to blame."""
    for simpler in _simpler(recipe):
        found = judged(simpler)
        if found.kind == verdict.kind:
            return shrunk(simpler, found, judged)
    return recipe, verdict


def _simpler(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one thing less."""
    for number in range(len(recipe.states)):
        yield replace(recipe, states=(*recipe.states[:number], *recipe.states[number + 1 :]))
    plain: dict[str, Any] = {
        "root": "plain",
        "optimizer": "plain",
        "frozen": False,
        "to_none": True,
        "input_grad": False,
        "smaller": False,
        "handle": "planned",
    }
    for number, step in enumerate(recipe.steps):
        if step != Step():
            yield replace(recipe, steps=(*recipe.steps[:number], Step(), *recipe.steps[number + 1 :]))
    for name, value in plain.items():
        if getattr(recipe, name) != value:
            yield replace(recipe, **{name: value})


def blamed(recipe: Recipe) -> list[str]:
    """What a recipe has that a plain loop has not."""
    found = [held.kind for held in recipe.states]
    for step in recipe.steps:
        found += [*step.extras, *([step.shape] * (step.shape != "plain"))]
        found += [f"midway: {step.midway}"] * (step.midway != "nothing")
    found += [name for name in ("frozen", "input_grad", "smaller") if getattr(recipe, name)]
    found += [f"root: {recipe.root}"] * (recipe.root != "plain")
    found += [recipe.optimizer] * (recipe.optimizer == "in the backward")
    found += ["zeros as gradients"] * (not recipe.to_none) + ["by the model"] * (recipe.handle == "model")
    return found or ["nothing"]
