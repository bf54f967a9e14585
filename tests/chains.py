"""Random chains for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from scheduler.chain import Chain, Option, Stage


@st.composite
def chains(
    draw: st.DrawFn, stages: int, options: int = 2, largest: int = 6, *, signed: bool = False
) -> Chain:
    """Chains of up to ``stages`` stages; integer seconds, so that sums are exact.

    Boundaries are at most ``largest`` bytes, saved tensors twice as large. Transients, gradients and what stays after a
    backward are each absent, alike, or up to five times as large, so that each is at times what decides.

    Args:
        signed: stages may let go of a part of their input, and take less for a backward, or a run just before it.
    """
    scale = st.sampled_from([largest, 0, 5 * largest])
    gradient, lasting = draw(scale), draw(scale)
    keeping, passing, reversing = draw(scale), draw(scale), draw(scale)  # transients

    def size(most: int) -> int:
        return draw(st.integers(0, most))

    def option(name: str, entering: int) -> Option:
        saved, transient, backward = size(2 * largest), size(keeping), size(reversing)
        if not signed:
            return Option(saved, float(size(5)), transient, backward, name)
        released = size(entering)
        again = draw(st.none() | st.integers(-saved, transient))
        return Option(
            saved - released,
            float(size(5)),
            transient + released,
            backward - size(saved),
            name,
            rerun_overhead=None if again is None else again + released,
        )

    def stage(name: str) -> Stage:
        carried, entering = size(lasting), size(largest)
        return Stage(
            name,
            forward=float(size(9)),
            backward=float(size(9)),
            input=entering,
            options=tuple(
                option(f"option {k}", entering if name != "0" else 0)
                for k in range(draw(st.integers(1, options)))
            ),
            forward_overhead=size(passing),
            input_grad=size(gradient),
            grad=size(lasting),
            carried=carried,
            carried_change=draw(st.integers(-carried, lasting)),
            recomputable=draw(st.integers(0, 7)) > 0,
        )

    count = draw(st.integers(1, stages) | st.just(stages))
    return Chain(
        tuple(stage(str(i)) for i in range(count)),
        size(largest),
        size(gradient),
        fixed=draw(st.integers(0, 9)),
    )
