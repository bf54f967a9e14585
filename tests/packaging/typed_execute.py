"""What type checkers say of ``execute``: mypy checks this file, and nothing runs it."""

from __future__ import annotations

from typing import assert_type

from torch import nn

from rematplan import Plan, execute


class Net(nn.Module):
    """A model with a method of its own."""

    def hello(self) -> int:
        return 1


def keeps_the_class(plan: Plan, net: Net) -> int:
    assert_type(execute(plan, net), Net)
    assert_type(execute([plan], nn.Sequential()), nn.Sequential)
    assert_type(execute(plan, [len, abs]), nn.Module)
    assert_type(execute(plan, lambda x: x), nn.Module)
    return execute(plan, net).hello()
