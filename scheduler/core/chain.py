"""Define the chain: what each stage of a model costs, in seconds and in bytes.

A model is cut into stages 0..L-1 that run in order. *Boundary* i is what crosses into stage i (x_i); boundary
L is the output. Solvers, the referee and plans share this one object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rematplan.scheduler.core.checks import is_integer, is_number
from rematplan.scheduler.core.json_data import (
    check_format,
    count,
    flag,
    integer,
    objects,
    optional,
    rows,
    seconds,
    text,
    version,
)

__all__ = ["CHAIN", "Carried", "Chain", "Option", "Stage"]

CHAIN_FORMAT = 1
_OPTION = objects(
    {"saved": integer},
    {
        "recompute": seconds,
        "forward_overhead": count,
        "backward_overhead": integer,
        "name": text,
        "keeps": rows(count),
        "rerun_overhead": optional(integer),
    },
)
_STAGE = objects(
    {"name": text, "forward": seconds, "backward": seconds, "input": count, "options": rows(_OPTION)},
    {
        "forward_overhead": integer,
        "input_grad": count,
        "grad": count,
        "carried": count,
        "carried_change": integer,
        "recomputable": flag,
        "enters": rows(count),
        "rerun_state": count,
    },
)
_CARRIED = objects(
    {"value": count, "made": count},
    {"readers": rows(count), "savers": rows(count), "freed": optional(count), "last": optional(count)},
)
CHAIN = objects(
    {
        "format": version,
        "stages": rows(_STAGE),
        "output": count,
        "output_grad": count,
        "fixed": count,
        "name": text,
    },
    {"values": rows(count), "carried": rows(_CARRIED)},
)


def _bytes(owner: str, field: str, value: Any, *, signed: bool = False) -> int:
    """Return ``value`` as a plain int, or a ValueError that names the field."""
    if not is_integer(value):
        raise ValueError(
            f"{owner}: {field}={value!r} must be an integer number of bytes; "
            "round sizes up to whole bytes first"
        )
    result = int(value)
    if result < 0 and not signed:
        raise ValueError(f"{owner}: {field}={result} must not be negative (bytes)")
    return result


def _seconds(owner: str, field: str, value: Any) -> float:
    """Return ``value`` as a float, or a ValueError that names the field."""
    if not is_number(value):
        raise ValueError(f"{owner}: {field}={value!r} must be a number of seconds")
    try:
        result = float(value)
    except OverflowError:  # an int beyond what a float holds
        result = math.inf
    if not math.isfinite(result) or result < 0:
        raise ValueError(f"{owner}: {field}={result} must be finite and not negative (seconds)")
    return result


def _values(owner: str, field: str, values: Any) -> tuple[int, ...]:
    return tuple(_bytes(owner, field, value) for value in values)


def _optional(owner: str, field: str, value: Any) -> int | None:
    return None if value is None else _bytes(owner, field, value)


def _signed(owner: str, field: str, value: Any) -> int:
    return _bytes(owner, field, value, signed=True)


def _check(self: Any, owner: str, check: Callable[[str, str, Any], Any], *fields: str) -> None:
    """Replace fields of a frozen dataclass by what ``check`` returns for them."""
    for field in fields:
        object.__setattr__(self, field, check(owner, field, getattr(self, field)))


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of which saved tensors of a stage stay between its forward and its backward.

    Attributes:
        saved: bytes that stay after the forward: output included; input and carried values excluded. What
            this forward releases is taken off: the part of its input that no backward needs. May be negative.
        recompute: seconds to rebuild, just before the backward, the saved tensors that did not stay.
        forward_overhead: transient bytes of this forward above the stage's input and ``saved``.
        backward_overhead: transient bytes of the backward above input, ``saved``, the gradient of the
            output and the gradient of the input. Parameter gradients count here while they appear. Negative
            where these are not all live at once: where the backward does not need the output, for instance.
        name: what is kept, in words.
        keeps: the values (``Chain.values``) that stay, those of the input that are needed again among them.
        rerun_overhead: ``forward_overhead`` of a run again just before the backward, which stops as soon as
            all that is kept is live. May be negative, since ``saved`` includes the output, which such a run
            does not produce. None means equal to ``forward_overhead``.
    """

    saved: int
    recompute: float = 0.0
    forward_overhead: int = 0
    backward_overhead: int = 0
    name: str = "all"
    keeps: tuple[int, ...] = ()
    rerun_overhead: int | None = None

    def __post_init__(self) -> None:
        _check(self, "Option", _signed, "saved")
        _check(self, "Option", _bytes, "forward_overhead")
        _check(self, "Option", _signed, "backward_overhead")
        if self.saved + self.forward_overhead < 0:
            raise ValueError(
                f"Option: saved={self.saved} and forward_overhead={self.forward_overhead} must not be negative together "
                "(bytes): a forward cannot take less than nothing"
            )
        _check(self, "Option", _seconds, "recompute")
        if not isinstance(self.name, str):
            raise ValueError(f"Option: name={self.name!r} must be a string")
        _check(self, "Option", _values, "keeps")
        if self.rerun_overhead is not None:
            _check(self, "Option", _signed, "rerun_overhead")

    def transient(self, *, again: bool) -> int:
        """Return bytes above input and ``saved`` while it runs; ``again``: just before its backward."""
        return self.rerun_overhead if again and self.rerun_overhead is not None else self.forward_overhead


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: a slice of the model.

    Attributes:
        name: for people.
        forward, backward: seconds of one run of each.
        input: bytes of x_i, the boundary that crosses into this stage; carried values excluded.
        options: what may stay after a forward; the first keeps all saved tensors.
        forward_overhead: transient bytes, above x_i and x_{i+1}, of a forward that keeps nothing. Negative
            where a part of x_i is also a part of x_{i+1}, and so live once.
        input_grad: bytes of the gradient of x_i.
        grad: bytes of the parameter gradients that its backward creates; 0 if they exist already.
        carried: bytes of long-lived values (U-Net skips, masks) that its first run leaves behind. A run again
            recomputes and releases them: ``forward_overhead`` has these bytes, but for the last stage,
            which runs once.
        carried_change: by how much its backward changes the bytes of long-lived values and of their
            gradients (negative where it releases them).
        recomputable: False for a stage that must run exactly once, and so is always kept.
        enters: the values (``Chain.values``) that x_i consists of.
        rerun_state: of ``Chain.fixed``, the bytes live only where the stage may run again, from its first run
            to its backward: the state of random-number generators, copies of buffers that it changes.
    """

    name: str
    forward: float
    backward: float
    input: int
    options: tuple[Option, ...]
    forward_overhead: int = 0
    input_grad: int = 0
    grad: int = 0
    carried: int = 0
    carried_change: int = 0
    recomputable: bool = True
    enters: tuple[int, ...] = ()
    rerun_state: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"Stage: name={self.name!r} must be a string")
        owner = f"Stage {self.name!r}"
        _check(self, owner, _seconds, "forward", "backward")
        _check(self, owner, _bytes, "input", "input_grad", "grad", "carried", "rerun_state")
        _check(self, owner, _signed, "forward_overhead", "carried_change")
        _check(self, owner, _values, "enters")
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options or not all(isinstance(o, Option) for o in self.options):
            raise ValueError(f"{owner}: options={self.options!r} must hold at least one Option")
        if not isinstance(self.recomputable, bool):
            raise ValueError(f"{owner}: recomputable={self.recomputable!r} must be a bool")

    @property
    def retained(self) -> int:
        """Net bytes that stay when its backward is over: parameter gradients and carried values."""
        return self.grad + self.carried_change


@dataclass(frozen=True, slots=True)
class Carried:
    """A long-lived value: a U-Net skip, a mask, an output. A boundary may hold a copy of it besides.

    Attributes:
        value: its number in ``Chain.values``.
        made: the stage that computes it.
        readers: stages after it that read it.
        savers: those of them whose backward needs it.
        freed: the stage whose ``carried_change`` takes it off; None if it outlives the step, for the user
            holds it.
        last: the stage after whose first run the user's code drops its reference; None if it is held until
            the forward ends.
    """

    value: int
    made: int
    readers: tuple[int, ...] = ()
    savers: tuple[int, ...] = ()
    freed: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        _check(self, "Carried", _bytes, "value", "made")
        _check(self, "Carried", _values, "readers", "savers")
        _check(self, "Carried", _optional, "freed", "last")


@dataclass(frozen=True, slots=True)
class Chain:
    """A whole training step as a chain of L stages.

    Attributes:
        stages: L stages in the order in which they run.
        output: bytes of boundary L.
        output_grad: bytes of its gradient.
        fixed: bytes live during the whole step: parameters, buffers, optimizer state, inputs.
        name: for people.
        values: bytes of each value (a storage) that crosses a boundary or stays for a backward. Where they
            are known, the referee follows every one of them (``account.py``), and solvers use the sums
            above, which are at least as many bytes. Empty where only the sums are known.
        carried: the long-lived ones among the values.
    """

    stages: tuple[Stage, ...]
    output: int
    output_grad: int
    fixed: int = 0
    name: str = "chain"
    values: tuple[int, ...] = ()
    carried: tuple[Carried, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "carried", tuple(self.carried))
        if not self.stages or not all(isinstance(s, Stage) for s in self.stages):
            raise ValueError("Chain: stages must hold at least one Stage")
        _check(self, "Chain", _bytes, "output", "output_grad", "fixed")
        _check(self, "Chain", _values, "values")
        self._check_carried()
        self._check_stages()
        state = sum(stage.rerun_state for stage in self.stages)
        if state > self.fixed:
            raise ValueError(f"Chain: fixed={self.fixed} must hold rerun_state of all stages, {state} bytes")
        carried = sum(stage.carried for stage in self.stages)
        for stage in reversed(self.stages):
            carried += stage.carried_change
            if carried < 0:
                raise ValueError(
                    f"Chain: the backward of stage {stage.name!r} lets go of {-carried} carried bytes "
                    "more than there are; carried_change must not exceed what the stages carry"
                )

    def _check_stages(self) -> None:
        """Refuse stages whose sums take off more than there is, or do not agree with the values."""
        long_lived = [0] * len(self.stages)
        for each in self.carried if self.values else ():
            long_lived[each.made] += self.values[each.value]
        for i, stage in enumerate(self.stages):
            if self.input_bytes(i + 1) + stage.forward_overhead < 0:
                raise ValueError(
                    f"Chain: stage {stage.name!r}: forward_overhead={stage.forward_overhead} takes off more than its "
                    f"output has, {self.input_bytes(i + 1)} bytes"
                )
            named = max(
                (*stage.enters, *(value for option in stage.options for value in option.keeps)), default=-1
            )
            if named >= len(self.values):
                raise ValueError(
                    f"Chain: stage {stage.name!r} names value {named}, and values holds {len(self.values)}"
                )
            if self.values and long_lived[i] != stage.carried:
                raise ValueError(
                    f"Chain: stage {stage.name!r}: carried={stage.carried}, and the carried values that it makes have "
                    f"{long_lived[i]} bytes"
                )
            entering = sum(self.values[value] for value in stage.enters)
            if self.values and entering != stage.input:
                raise ValueError(
                    f"Chain: the values that enter stage {stage.name!r} have "
                    f"{entering} bytes, and its input {stage.input}"
                )

    def _check_carried(self) -> None:
        """Refuse carried values that do not fit the values and the stages of the chain."""
        seen: set[int] = set()
        for each in self.carried:
            stages = (each.made, *each.readers, *each.savers, each.freed or 0, each.last or 0)
            if max(stages) >= len(self.stages) or each.value >= len(self.values) or each.value in seen:
                raise ValueError(
                    f"Chain: {each} does not fit {len(self.stages)} stages and {len(self.values)} values, each carried once at most"
                )
            if each.last is not None and each.last < each.made:
                raise ValueError(f"Chain: {each} is let go of before it is made")
            seen.add(each.value)

    def __len__(self) -> int:
        return len(self.stages)

    def input_bytes(self, boundary: int) -> int:
        """Return bytes of boundary ``boundary``, 0..L."""
        return self.output if boundary == len(self.stages) else self.stages[boundary].input

    def grad_bytes(self, boundary: int) -> int:
        """Return bytes of the gradient of boundary ``boundary``, 0..L."""
        stages = self.stages
        return self.output_grad if boundary == len(stages) else stages[boundary].input_grad

    @property
    def plain_seconds(self) -> float:
        """Seconds of the plain step: every stage once forward and once backward, all kept."""
        return sum(s.forward + s.backward for s in self.stages)

    def as_sums(self) -> Chain:
        """Return the chain without its values, and with no sum below 0, for solvers that need such sums.

        The referee counts at least as many bytes of it as of the chain itself, whose optimum may be another.
        """

        def positive(option: Option) -> Option:
            saved = max(option.saved, 0)
            forward = max(option.transient(again=False), option.transient(again=True)) + option.saved - saved
            return Option(saved, option.recompute, forward, max(option.backward_overhead, 0), option.name)

        stages = (
            replace(
                stage,
                options=tuple(map(positive, stage.options)),
                forward_overhead=max(stage.forward_overhead, 0),
                enters=(),
                rerun_state=0,
            )
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages), values=(), carried=())

    def apart(self) -> Chain:
        """Return the chain in sums that hold wherever its parts are, by which schedules that copy are judged.

        The sums of a chain that knows its values rely on x_i staying on the device while stage i is kept: the
        part of x_i that is also in x_{i+1} is not counted again with the saved tensors of stage i, and the
        part that nobody needs is taken off them. Here the saved tensors of stage i have all of x_{i+1}, and
        all that is kept and no part of x_i.
        """
        if not self.values:
            return self
        long_lived = {each.value for each in self.carried}
        leaving = [*(stage.enters for stage in self.stages[1:]), ()]

        def whole(option: Option, i: int) -> Option:
            own = ({*option.keeps} - {*self.stages[i].enters} | {*leaving[i]}) - long_lived
            saved = max(option.saved, sum(self.values[value] for value in own))
            twice = saved - option.saved  # live twice while x_i is live, and so among the transients
            forward = max(option.forward_overhead - twice, 0)
            backward = max(option.backward_overhead - twice, 0)
            return Option(saved, option.recompute, forward, backward, option.name)

        stages = (
            replace(stage, options=tuple(whole(option, i) for option in stage.options), enters=())
            for i, stage in enumerate(self.stages)
        )
        return replace(self, stages=tuple(stages), values=(), carried=())

    @classmethod
    def from_arrays(
        cls,
        forward: Sequence[float],
        backward: Sequence[float],
        boundary: Sequence[int],
        saved: Sequence[int],
        forward_overhead: Sequence[int] | None = None,
        backward_overhead: Sequence[int] | None = None,
        *,
        boundary_grad: Sequence[int] | None = None,
        grad: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        fixed: int = 0,
        name: str = "chain",
    ) -> Chain:
        """Return a chain in which every stage keeps all or nothing.

        Args:
            forward, backward: (L,) seconds.
            boundary: (L + 1,) bytes of x_0 .. x_L.
            saved: (L,) bytes that stay after stage i keeps all: output included, input excluded.
            forward_overhead, backward_overhead: (L,) transient bytes above inputs and results; default 0.
            boundary_grad: (L + 1,) bytes of the gradients of the boundaries; default ``boundary``.
            grad: (L,) bytes of parameter gradients that the backward of stage i creates; default 0.
            names: (L,) names; default "0", "1", ...
            fixed: bytes live during the whole step.

        Raises:
            ValueError: a wrong length, a negative, non-finite or non-integer number.

        Example:
            >>> chain = Chain.from_arrays([1.0] * 4, [2.0] * 4, boundary=[10] * 5, saved=[50] * 4)
            >>> len(chain), chain.plain_seconds
            (4, 12.0)
        """
        count = len(forward)
        zeros = [0] * count
        overhead_f = zeros if forward_overhead is None else forward_overhead
        overhead_b = zeros if backward_overhead is None else backward_overhead
        boundary_grad = boundary if boundary_grad is None else boundary_grad
        grad = zeros if grad is None else grad
        labels = [str(i) for i in range(count)] if names is None else names
        columns = {
            "backward": backward,
            "boundary": boundary,
            "saved": saved,
            "forward_overhead": overhead_f,
            "backward_overhead": overhead_b,
            "boundary_grad": boundary_grad,
            "grad": grad,
            "names": labels,
        }
        for field, column in columns.items():
            expected = count + field.startswith("boundary")
            if len(column) != expected:
                raise ValueError(
                    f"Chain.from_arrays: {field} has {len(column)} entries, expected {expected} "
                    f"for {count} stages"
                )
        options = [(Option(*row),) for row in zip(saved, zeros, overhead_f, overhead_b, strict=True)]
        inputs, input_grads = boundary[:count], boundary_grad[:count]
        rows = zip(labels, forward, backward, inputs, options, overhead_f, input_grads, grad, strict=True)
        return cls(tuple(Stage(*row) for row in rows), boundary[count], boundary_grad[count], fixed, name)

    def to_json(self) -> dict[str, Any]:
        """Return the chain as JSON-ready data."""
        return {"format": CHAIN_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Chain:
        """Return the chain that ``to_json`` wrote.

        Raises:
            ValueError: the data is no chain, or of an unknown format.
        """
        check_format("Chain.from_json", data, CHAIN_FORMAT)
        try:
            CHAIN("chain", data)
            stages = tuple(
                Stage(**{**stage, "options": tuple(Option(**option) for option in stage["options"])})
                for stage in data["stages"]
            )
            carried = tuple(Carried(**each) for each in data.get("carried", ()))
            plain = {name: value for name, value in data.items() if name != "format"}
            return cls(**{**plain, "stages": stages, "carried": carried})
        except ValueError as error:
            raise ValueError(f"Chain.from_json: not a chain: {error}") from error
