"""Arguments of solvers: plain ints in range, or an error that names the call and the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.solvers.checks import (
    MOST_BYTES,
    MOST_SECONDS,
    checked_budget,
    checked_chain,
    checked_count,
    checked_sums,
)


@pytest.mark.parametrize("value", [1, 7, np.int64(3), True.__index__()])
def test_whole_numbers_become_plain_ints(value: Any) -> None:
    for found in (checked_count("f", "slots", value), checked_budget("f", value)):
        assert type(found) is int
        assert found == value


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_what_is_no_whole_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^f: slots=.* must be an int$"):
        checked_count("f", "slots", value)
    with pytest.raises(TypeError, match=r"^f: memory_budget=.* must be an int number of bytes$"):
        checked_budget("f", value)


def test_numbers_out_of_range_are_refused() -> None:
    assert checked_count("f", "slots", 0, least=0) == 0
    with pytest.raises(ValueError, match="f: slots=1 must be at least 2"):
        checked_count("f", "slots", 1, least=2)
    assert checked_budget("f", 2**63 - 1) == 2**63 - 1
    for budget in (0, -1, 2**63):
        with pytest.raises(ValueError, match=f"f: memory_budget={budget} must be in 1"):
            checked_budget("f", budget)


def test_sums_that_could_overflow_are_refused() -> None:
    def chain(seconds: float, size: int) -> Chain:
        return Chain.from_arrays([seconds] * 2, [seconds] * 2, [1] * 3, [size] * 2)

    checked_sums("f", chain(1.0, MOST_BYTES // 4))
    with pytest.raises(ValueError, match=r"f: .* bytes; they must stay below 2\*\*62"):
        checked_sums("f", chain(1.0, MOST_BYTES // 2))
    with pytest.raises(ValueError, match="f: the chain's seconds add up to"):
        checked_sums("f", chain(MOST_SECONDS / 4, 1))


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(TypeError, match=r"f: chain=3 must be a Chain; see Chain\.from_arrays"):
        checked_chain("f", 3)
