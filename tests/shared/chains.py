"""Random chains for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from rematplan.scheduler.core.chain import Chain, Option, Stage


@st.composite
def chains(
    draw: st.DrawFn, stages: int, options: int = 2, largest: int = 6, *, signed: bool = False
) -> Chain:
    """Chains of up to ``stages`` stages; integer seconds, so that sums are exact.

    Boundaries are at most ``largest`` bytes, saved tensors twice as large. Transients, gradients and what
    stays after a backward are each absent, alike, or up to five times as large, so that each is at times what
    decides.

    Args:
        signed: stages may release a part of their input, and take less for a backward, or a run just before
            it. Their saved tensors hold their output then.
    """
    scale = st.sampled_from([largest, 0, 5 * largest])
    gradient, lasting = draw(scale), draw(scale)
    keeping, passing, reversing = draw(scale), draw(scale), draw(scale)  # transients

    def size(most: int) -> int:
        return draw(st.integers(0, most))

    count = draw(st.integers(1, stages) | st.just(stages))
    boundary = [size(largest) for _ in range(count + 1)]

    def option(i: int, name: str) -> Option:
        saved, transient, backward = size(2 * largest), size(keeping), size(reversing)
        if not signed:
            return Option(saved, float(size(5)), transient, backward, name)
        saved += boundary[i + 1]  # the output lies inside, and no more of it goes than there is
        released = size(boundary[i]) if i else 0
        again = draw(st.none() | st.integers(-saved, transient))
        return Option(
            saved - released,
            float(size(5)),
            transient + released,
            backward - size(saved),
            name,
            rerun_overhead=None if again is None else again + released,
        )

    def stage(i: int) -> Stage:
        carried = size(lasting)
        return Stage(
            str(i),
            forward=float(size(9)),
            backward=float(size(9)),
            input=boundary[i],
            options=tuple(option(i, f"option {k}") for k in range(draw(st.integers(1, options)))),
            forward_overhead=size(passing),
            input_grad=size(gradient),
            grad=size(lasting),
            carried=carried,
            carried_change=draw(st.integers(-carried, lasting)),
            recomputable=draw(st.integers(0, 7)) > 0,
        )

    return Chain(
        tuple(map(stage, range(count))), boundary[count], size(gradient), fixed=draw(st.integers(0, 9))
    )
