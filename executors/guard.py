"""Whether a planned model is still the one that its plan was made for: its submodules, their modes and hooks."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch._C import _functorch as functorch

from scheduler.capture.graph import unfired_hook
from scheduler.errors import PlanMismatch

__all__ = ["Guard", "reject_transforms"]


def reject_transforms(model: nn.Module) -> None:
    """Refuse a planned forward within a transform of torch.func, where autograd keeps what no hook sees.

    Raises:
        PlanMismatch: says what to call instead.
    """
    if functorch.get_dynamic_layer_stack_depth():
        raise PlanMismatch(
            f"planned {type(model).__name__}: called within torch.vmap or a transform of torch.func (grad, vjp, jvp, jacrev), "
            "which a plan cannot be followed in; transform the plain model, the one given to execute(), or train by "
            "torch.autograd"
        )


class Guard:
    """What a plan takes for granted of a model, checked at every training forward, which costs some 0.3 µs a submodule.

    Args:
        model: as it is when the plan begins to work.
        evaluating: names of the submodules that were in eval mode when the plan was made.
    """

    def __init__(self, model: nn.Module, evaluating: Collection[str]) -> None:
        self.names = [name for name, _ in model.named_modules()]
        self.modules = [(module, name not in evaluating) for name, module in model.named_modules()]
        self.children = [(m, m._modules, [*m._modules.values()]) for m, _ in self.modules if m._modules]
        self.hooked = [
            (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            for m, _ in self.modules[1:]
        ]
        self.hooks = self._count()
        self.tensors = [values for m, _ in self.modules for values in (m._parameters, m._buffers)]
        self.known = [(*m._parameters, *m._buffers) for m, _ in self.modules]
        self.count = sum(map(len, self.tensors))

    def check(self, model: nn.Module, fires_hooks: bool) -> None:
        """Compare.

        Args:
            fires_hooks: whether a step of the plan fires the hooks of submodules.

        Raises:
            PlanMismatch: a submodule was put in the place of another, is in another mode, or has a hook that would not fire.
        """
        for module, training in self.modules:
            if module.training is not training:
                name = self._name_of(module)
                mode = "eval" if training else "train"
                raise PlanMismatch(
                    f"planned {type(model).__name__}: submodule {name!r} is in {mode} mode, and was not when the plan "
                    "was made; put it back, or call solve() again in this mode"
                )
        for holder, children, before in self.children:
            if [*children.values()] != before:
                raise PlanMismatch(
                    f"planned {type(model).__name__}: submodules of {self._name_of(holder) or 'the model'!r} were added, replaced or removed "
                    "since the plan was made; call solve() and execute() again on the model as it is now"
                )
        self._check_tensors(model)
        if not fires_hooks and (count := self._count()) != self.hooks:
            hook = unfired_hook(model)
            if hook is not None:
                raise PlanMismatch(
                    f"planned {type(model).__name__}: {hook}, and the plan replays one; remove the hook, or call solve() and "
                    "execute() again with it"
                )
            self.hooks = count

    def _check_tensors(self, model: nn.Module) -> None:
        """Compare the names of parameters and buffers, which are looked through only where there are more or fewer.

        Raises:
            PlanMismatch: one is gone: weight_norm, pruning and the like put others in its place.
        """
        count = sum(map(len, self.tensors))
        if count == self.count:
            return
        for (holder, _), *owned in zip(
            self.modules, self.tensors[::2], self.tensors[1::2], self.known, strict=True
        ):
            parameters, buffers, known = owned
            gone = [name for name in known if name not in parameters and name not in buffers]
            if gone:
                name = ".".join(filter(None, (self._name_of(holder), gone[0])))
                raise PlanMismatch(
                    f"planned {type(model).__name__}: {name!r} is no parameter or buffer of the model any more (weight_norm, "
                    "spectral_norm, pruning and parametrizations put others in the place of a weight); call solve() and "
                    "execute() again on the model as it is now"
                )
        self.count = count

    def _name_of(self, module: nn.Module) -> str:
        """What a submodule was called when the plan began to work."""
        return self.names[next(i for i, (other, _) in enumerate(self.modules) if other is module)]

    def _count(self) -> int:
        """How many hooks the submodules have."""
        return sum([len(a) + len(b) + len(c) + len(d) for a, b, c, d in self.hooked])
