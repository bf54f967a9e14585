"""A step function as a model: any callable that calls the models it uses, and returns the loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.callables import (
    CallableChain,
    cut_off,
    modules_in,
    name_of,
    variables,
)
from rematplan.scheduler.torch_layer.call import read_sample
from rematplan.scheduler.torch_layer.fsdp import reject_wrapped
from rematplan.scheduler.torch_layer.leaves import map_tensors, tensors_in
from rematplan.scheduler.torch_layer.private import is_compiled_function, pytree, replaced

__all__ = ["Refused", "StepFunction", "as_model"]

_MARK = "rematplan: the module "


class Refused(ValueError):
    """A step function does what no plan can follow."""


def as_model(model: Any, sample: Any = ()) -> Any:
    """Return a list of callables as a chain, another callable as a step function; anything else as it is.

    Args:
        sample: what it is called with, where modules among that belong to the step.
    """
    if isinstance(model, (list, tuple)):
        return CallableChain(model)
    if callable(model) and not isinstance(model, (nn.Module, type)):
        try:
            arguments, keywords = read_sample(sample)
        except TypeError:  # solve says so
            arguments, keywords = (), {}
        return _step_function(model, arguments, keywords)
    return model


class StepFunction(nn.Module):
    """A function that gives the loss of a batch, with the modules that it uses; see ``_step_function``.

    It is in train mode if one of these is.
    """

    function: Callable[..., Any]
    given: dict[nn.Module, str]  # modules that are arguments -> what stands for them in a call

    def __init__(self, function: Callable[..., Any], given: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # Not as an attribute: a module would be there twice.
        self.__dict__.update(function=function, given={})
        names: dict[nn.Module, str] = {}
        for name, module in modules_in(function, everywhere=True):
            names.setdefault(module, name)
        names.update({module: name for name, module in given.items()})
        for module, path in names.items():
            if any(module is not other and module in set(other.modules()) for other in names):
                continue  # it is in another one
            self._reject(module, path)
            name = re.sub(r"\W", "_", path) or "module"
            while hasattr(self, name):
                name += "_"
            self.add_module(name, module)
        if not self._modules:
            raise ValueError(
                f"solve: no module was found in the step function {name_of(function)}: nowhere in its closure, in the global "
                "variables that it names, in what it is bound to or in the sample; bind it: functools.partial(function, model)"
            )
        for module in given.values():
            self.given[module] = _MARK + next(n for n, m in self.named_modules() if m is module)

    @property
    def training(self) -> bool:
        """Whether one of the modules is in train mode."""
        return any(module.training for module in self.children())

    @training.setter
    def training(self, mode: bool) -> None:
        """Change nothing: ``train`` and ``eval`` set the modules themselves."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; names stand for modules among the arguments, which are submodules."""
        args, kwargs = self.marked(args, kwargs)
        return super().__call__(*args, **kwargs)

    def marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with names in the places of modules.

        Raises:
            ValueError: a module that the plan does not know.
        """
        if not self.given:
            return args, kwargs
        args, kwargs = pytree.tree_map_only(nn.Module, self._mark, (args, kwargs))
        return args, kwargs

    def _mark(self, module: nn.Module) -> str:
        if module not in self.given:
            raise ValueError(
                f"planned {type(self).__name__}: an argument is a {type(module).__name__} that the plan was not made for; call "
                "solve() with it in the sample"
            )
        return self.given[module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        if self.given:
            args, kwargs = pytree.tree_map_only(str, self._module, (args, kwargs))
        return self.function(*args, **kwargs)

    def _module(self, value: str) -> Any:
        return self.get_submodule(value.removeprefix(_MARK)) if value.startswith(_MARK) else value

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the function once in grad mode; the caller preserves the state of the modules.

        Raises:
            Refused: it uses a parameter of a module that was not found; or it reverses the loss itself.
        """
        name = type(self).__name__
        args, kwargs = map_tensors(cut_off, (args, kwargs))

        def used() -> list[Tensor]:
            with torch.enable_grad(), _only_forward(name):
                return [*variables(self(*args, **kwargs))]

        unknown = set(used()).difference(self.parameters(), tensors_in((args, kwargs)))
        if unknown:  # what the function itself makes is another tensor each time
            unknown &= set(used())
        for tensor in unknown:
            raise Refused(
                f"solve: the step function {name} uses a tensor of shape {tuple(tensor.shape)} that requires grad and belongs to "
                "no module that was found in it; make it a parameter of a module, and bind that: functools.partial(function, "
                "module)"
            )

    def extra_repr(self) -> str:
        """Return the function's name."""
        return name_of(self.function)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} is a step function, whose copy would still use the modules of this one, so that it cannot "
            "be copied or pickled; save the plan (plan.save) and the modules (state_dict), and execute the plan there"
        )

    def _reject(self, module: nn.Module, name: str) -> None:
        if getattr(type(module), "_rematplan_plain", None) is not None:
            raise ValueError(
                f"solve: the step function {type(self).__name__} calls {name!r}, which trains by a plan already; let it call the "
                "plain model, the one that was given to execute(): the plan is for the whole step"
            )
        if module._compiled_call_impl is None:
            reject_wrapped("solve", module)


def _step_function(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> StepFunction:
    """Return a step function as a model, of a class that has its name and its signature.

    The modules that it uses are looked for in its closure, in the global variables that it names, in what a
    ``functools.partial`` binds or the object of a bound method holds, in lists, tuples, dicts and plain
    objects in these, and among the arguments.

    Raises:
        ValueError: there are none, or one must not be planned from inside; or the function is compiled.
    """
    if is_compiled_function(function):
        raise ValueError(
            f"solve: the step function {name_of(function)} is compiled, which would lose the schedule; pass the function itself, "
            "and compile blocks of its modules instead (block.compile())"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a callable written in C, say
        signature = inspect.signature(lambda *args, **kwargs: None)
    cls = _class_of(name_of(function), getattr(function, "__module__", None) or "", signature)
    try:
        bound = signature.bind(*arguments, **keywords).arguments
    except TypeError:  # solve says so, as of any model
        bound = {}
    given = {
        name if leaf is value else f"{name}_{at}": leaf
        for name, value in bound.items()
        for at, leaf in enumerate(pytree.tree_leaves(value))
        if isinstance(leaf, nn.Module)
    }
    return cls(function, given)


_CLASSES: dict[tuple[str, str, str], type[StepFunction]] = {}  # by name, module and signature


def _class_of(name: str, module: str, signature: inspect.Signature) -> type[StepFunction]:
    def forward(self: StepFunction, *args: Any, **kwargs: Any) -> Any:
        return StepFunction.forward(self, *args, **kwargs)

    key = name, module, str(signature)
    if key not in _CLASSES:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        # Whatever its kind, torch.export and people give the parameters by name.
        forward.__signature__ = inspect.Signature([own, *signature.parameters.values()])  # type: ignore[attr-defined]
        members = {"forward": forward, "__module__": module, "__qualname__": name}
        _CLASSES[key] = type(name.rpartition(".")[2], (StepFunction,), members)
    return _CLASSES[key]


@contextmanager
def _only_forward(name: str) -> Iterator[None]:
    """Refuse within it to reverse into gradients, and to set them to zero: a plan would leave that out."""
    reversing, zeroing = (Tensor, torch.autograd), (nn.Module, torch.optim.Optimizer)
    places = [*((owner, "backward") for owner in reversing), *((owner, "zero_grad") for owner in zeroing)]

    def refusing(what: str) -> Callable[..., None]:
        def refuse(*_: Any, **__: Any) -> None:
            raise Refused(
                f"solve: the step function {name} calls {what}() itself; let it return the loss, and call {what}() in the "
                "training loop, outside of it"
            )

        return refuse

    with ExitStack() as stack:
        for owner, what in places:
            stack.enter_context(replaced(owner, **{what: refusing(what)}))
        yield
