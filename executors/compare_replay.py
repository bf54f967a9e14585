"""Re-runs compared with the first runs of their stages: what they read, what they save, what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rematplan.executors.as_read import AsRead, changed_samples
from rematplan.executors.fingerprints import CHECKS, Fingerprint, difference

if TYPE_CHECKING:
    from rematplan.executors.engine import Stages

__all__ = ["ReplayCheck", "ReplayError"]


class ReplayError(RuntimeError):
    """A stage cannot be replayed exactly; no gradient was returned."""


class ReplayCheck:
    """Notes what the first runs of a step's stages were like, and refuses re-runs that differ.

    Args:
        check: how tensors are compared; a key of ``CHECKS``.
        faked: whether they have no data.
        stages: name themselves and their saved tensors in errors.

    Attributes:
        sampled: whether a few values of what re-runs read are compared.
        thorough: whether runs of which nothing is saved are compared, too, to name the op that differs first.
    """

    def __init__(self, check: str, faked: bool, stages: Stages) -> None:
        self.sampled = check != "none" and not faked
        self.thorough = check == "values"
        self._take, self._stages = CHECKS[check], stages
        self._boundaries: dict[int, tuple[Fingerprint, ...]] = {}
        # One of each: Python's collector goes through all objects of a step of many stages, again and again.
        self._known: dict[Any, Any] = {}
        self._start: AsRead | None = None  # the held boundary that the next run starts from

    def fingerprint(self, tensor: Tensor) -> Fingerprint:
        """Return what a tensor is compared by."""
        found = self._take(tensor)
        return self._known.setdefault(found, found)

    def note_boundary(self, boundary: int, tensors: tuple[Tensor, ...]) -> None:
        """Note the tensors of a boundary, the output of the stage before it."""
        found = tuple(map(self._take, tensors))
        self._boundaries[boundary] = self._known.setdefault(found, found)

    def starts_from(self, boundary: int, read: AsRead) -> None:
        """Refuse a held boundary that was changed in place; its values are compared with the other inputs."""
        if read.changed():
            self._refuse_changed(f"boundary {boundary}, the output of {self._stages.name(boundary - 1)},")
        self._start = read

    def check_reads(self, stage: int, reads: Sequence[AsRead], name_of: Callable[[int, int], str]) -> None:
        """Refuse to run a stage again on other inputs than those of its first run (rule 9 of step.py).

        Args:
            reads: its parameters, buffers and arguments.
            name_of: of one of them (which of the reads, number), in words; "" if this run does not read it.

        Raises:
            RuntimeError: it has been changed in place, has been given other data, or has other values.
        """
        for which, read in enumerate(reads):
            for number in read.changed():
                self._refuse_changed(name_of(which, number), stage)
        start, self._start = self._start, None
        if self.sampled:
            for which, number in changed_samples([*reads, start] if start is not None else reads):
                of_start = f"tensor {number} of the boundary that it starts from"
                self._refuse_changed(of_start if which == len(reads) else name_of(which, number), stage)

    def _refuse_changed(self, what: str, stage: int | None = None) -> None:
        where = "a stage" if stage is None else f"stage {stage} ({self._stages.name(stage)})"
        if what:
            raise RuntimeError(
                f"{what} has been modified by an inplace operation, or through .data, between forward and backward, so that "
                f"{where} cannot be replayed; step the optimizer after backward"
            )

    def check_output(self, stage: int, produced: tuple[Tensor, ...]) -> None:
        """Refuse a re-run that gives the next stage something else than the first run did."""
        expected = self._boundaries.get(stage + 1, ())
        found = tuple(map(self._take, produced))
        if found != expected:
            for number, (one, other) in enumerate(zip(expected, found, strict=False)):
                self._refuse(stage, f"its output {number}", one, other)

    def check_saved(self, stage: int, index: int, expected: Fingerprint | None, tensor: Tensor) -> None:
        """Refuse a re-run that saves something else than the first run did; None is not compared."""
        if expected is not None:
            found = self._take(tensor)
            if found != expected:
                self._refuse(stage, self._stages.saved_name(stage, index), expected, found)

    def _refuse(self, stage: int, what: str, expected: Fingerprint, found: Fingerprint) -> None:
        how = difference(expected, found)
        if how is not None:
            raise self.error(
                stage,
                f"{what} {how}; the model does not run the same ops twice on the same input: make it deterministic, or keep "
                "this stage",
            )

    def error(self, stage: int, what: str) -> ReplayError:
        """Return the error of a stage that cannot be replayed."""
        return ReplayError(f"stage {stage} ({self._stages.name(stage)}): {what}")
