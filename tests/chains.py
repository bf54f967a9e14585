"""Random chains for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from scheduler.chain import Chain, Option, Stage


@st.composite
def chains(draw: st.DrawFn, stages: int, options: int = 2, largest: int = 6) -> Chain:
    """Chains of up to ``stages`` stages; integer seconds, so that sums are exact.

    Boundaries are at most ``largest`` bytes, saved tensors twice as large. Transients, gradients and what stays after a
    backward are each absent, alike, or up to five times as large, so that each is at times what decides.
    """
    scale = st.sampled_from([largest, 0, 5 * largest])
    gradient, lasting = draw(scale), draw(scale)
    keeping, passing, reversing = draw(scale), draw(scale), draw(scale)  # transients

    def size(most: int) -> int:
        return draw(st.integers(0, most))

    def stage(name: str) -> Stage:
        carried = size(lasting)
        return Stage(
            name,
            forward=float(size(9)),
            backward=float(size(9)),
            input=size(largest),
            options=tuple(
                Option(size(2 * largest), float(size(5)), size(keeping), size(reversing), f"option {k}")
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
