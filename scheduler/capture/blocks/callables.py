"""A list of plain callables as a model: the chain is the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.found import modules_in, name_of
from rematplan.scheduler.torch_layer.private import pytree

__all__ = ["CallableChain", "cut_off", "variables"]


class CallableChain(nn.Module):
    """Callables that run one after the other, each a stage: time steps, layers, parts of one function.

    The first is called with the arguments of the chain. Each other is called with what the one before
    returned: a tuple as positional arguments, anything else as the one argument. What the last one returns is
    the output.

    The modules that a callable uses are looked for in the callable itself: a module, the object of a bound
    method, what a ``functools.partial`` binds, the closure, and lists, tuples and dicts in these. Each is a
    submodule of its stage, so that ``parameters()`` of the chain are those to be trained. Other tensors in
    these (an input, in a closure) are outside of a plan's account, as is all that was there before the step.

    Args:
        callables: at least one; it may be given several times.
        modules: further modules that callables use (global variables, say); they count as used by every one.

    Raises:
        TypeError: not callables, or not modules.
        ValueError: there is none.
    """

    def __init__(self, callables: Iterable[Callable[..., Any]], *, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        functions, further = list(callables), list(modules)
        for position, function in enumerate(functions):
            if not callable(function):
                raise TypeError(
                    f"CallableChain: callables[{position}] is a {type(function).__name__}, expected a callable"
                )
        for position, module in enumerate(further):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"CallableChain: modules[{position}] is a {type(module).__name__}, expected a torch.nn.Module"
                )
        if not functions:
            raise ValueError("CallableChain: callables is empty, expected at least one")
        self.stages = nn.ModuleList(_Stage(function, further) for function in functions)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the callables; return the output of the last."""
        first, *others = self.stages
        value = first(*args, **kwargs)
        for stage in others:
            value = stage(*value) if isinstance(value, tuple) else stage(value)
        return value

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run every callable once in grad mode; the caller preserves the chain's state.

        Raises:
            ValueError: one uses a parameter of a module that was not found in it.
        """
        value: Any = args
        for position, stage in enumerate(self.stages):
            positional = value if isinstance(value, tuple) else (value,)
            given = pytree.tree_map_only(Tensor, cut_off, (positional, kwargs))
            with torch.enable_grad():
                value = stage(*given[0], **given[1])
            kwargs = {}
            known = {*stage.parameters(), *(t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))}
            for tensor in variables(value):
                if tensor not in known:
                    raise ValueError(
                        f"callable {position} ({name_of(stage.function)}) uses a tensor of shape {tuple(tensor.shape)} that "
                        "requires grad and belongs to no module that was found in it; pass its module: "
                        "CallableChain(callables, modules=[module])"
                    )


class _Stage(nn.Module):
    """One callable, and the modules that it uses."""

    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], further: list[nn.Module]) -> None:
        super().__init__()
        self.used = nn.ModuleList(dict.fromkeys((*(m for _, m in modules_in(function)), *further)))
        # Not as an attribute: a module would be there twice.
        self.__dict__["function"] = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return name_of(self.function)


def cut_off(tensor: Tensor) -> Tensor:
    """Return the tensor without its history."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def variables(value: Any) -> Iterator[Tensor]:
    """Return the leaves that a backward from the tensors in ``value`` would make gradients of."""
    waiting: list[Any] = [t.grad_fn for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        waiting.extend(following for following, _ in node.next_functions)
