"""Check that a planned model is still that of its plan: submodules, modes, hooks, parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.graph.export import unfired_hook
from rematplan.scheduler.core.errors import PlanMismatch
from rematplan.scheduler.torch_layer.private import Convolution, transform_depth

__all__ = ["Guard", "Trainable", "benchmarks_convolutions", "reject_recording", "reject_transforms"]

_requires_grad = attrgetter("requires_grad")


def reject_transforms(model: nn.Module) -> None:
    """Raise PlanMismatch within a transform of torch.func, where autograd saves tensors that no hook sees."""
    if transform_depth():
        raise PlanMismatch(
            f"planned {type(model).__name__}: called within torch.vmap or a transform of torch.func (grad, vjp, jvp, jacrev), "
            "which a plan cannot be followed in; transform the plain model, the one given to execute(), or train by "
            "torch.autograd"
        )


def reject_recording(model: nn.Module) -> None:
    """Raise PlanMismatch while a CUDA graph records, which holds neither replays nor random numbers."""
    if torch.cuda.is_current_stream_capturing():
        raise PlanMismatch(
            f"planned {type(model).__name__}: called while a CUDA graph records (torch.cuda.graph, make_graphed_callables), which "
            "cannot hold the decisions and random numbers of replays; run planned steps outside of it, or record the plain "
            "model, the one given to execute()"
        )


def benchmarks_convolutions(model: nn.Module, device: torch.device) -> bool:
    """Return whether cuDNN tries algorithms for convolutions, again in autograd's thread for replays."""
    cudnn = torch.backends.cudnn
    on = device.type == "cuda" and cudnn.enabled and cudnn.benchmark and not cudnn.deterministic
    return on and any(isinstance(module, Convolution) for module in model.modules())


class Guard:
    """Checks at every training forward what a plan assumes of a model's modules.

    Args:
        model: as the plan found it.
        evaluating: names of the submodules that were in eval mode when the plan was made.
    """

    def __init__(self, model: nn.Module, evaluating: Collection[str]) -> None:
        named = list(model.named_modules())
        # A step function's mode is that of its modules.
        moded = [(name, vars(module)) for name, module in named if "training" in vars(module)]
        self.names = [name for name, _ in moded]
        self.attributes = [attributes for _, attributes in moded]
        self.modes = [name not in evaluating for name in self.names]
        self.parents = [name for name, m in named if m._modules]
        self.children = [m._modules for _, m in named if m._modules]
        self.before = [dict(each) for each in self.children]
        hooked = [
            d for _, m in named[1:] for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]  # fmt: skip # four dicts a module
        # Most are empty: one any() checks those.
        self.empty, self.hooked = [d for d in hooked if not d], [d for d in hooked if d]
        self.hooks = [*map(len, self.hooked)]

    def check(self, model: nn.Module, fires_hooks: bool) -> None:
        """Raise PlanMismatch if a submodule was added, replaced or removed, or has a hook that does not fire.

        Args:
            fires_hooks: whether a step of the plan fires the hooks of submodules.
        """
        if self.children != self.before:
            for name, children, before in zip(self.parents, self.children, self.before, strict=True):
                other = [key for key, module in before.items() if children.get(key) is not module]
                other += [key for key in children if key not in before]
                if not other:
                    continue
                names = ", ".join(repr(".".join(filter(None, (name, key)))) for key in other[:3])
                raise PlanMismatch(
                    f"planned {type(model).__name__}: submodules of {name or 'the model'!r} were added, replaced or removed ({names}) "
                    "since the plan was made; call solve() and execute() again on the model as it is now"
                )
        if not fires_hooks and (any(self.empty) or [*map(len, self.hooked)] != self.hooks):
            hook = unfired_hook(model)
            if hook is not None:
                raise PlanMismatch(
                    f"planned {type(model).__name__}: {hook}, and the plan replays one; remove the hook, or call solve() and "
                    "execute() again with it"
                )
            hooked = [d for d in (*self.hooked, *self.empty) if d]
            self.empty, self.hooked = [d for d in self.empty if not d], hooked
            self.hooks = [*map(len, self.hooked)]

    def in_modes(self) -> bool:
        """Return whether every module is still in its mode, train or eval."""
        return [attributes["training"] for attributes in self.attributes] == self.modes

    def mode_difference(self) -> str | None:
        """Return the first module that is in another mode, in words."""
        for name, attributes, mode in zip(self.names, self.attributes, self.modes, strict=True):
            if attributes["training"] is not mode:
                return f"submodule {name!r} is in {'eval' if mode else 'train'} mode"
        return None


class Trainable:
    """The parameters of a model where they are kept, and which of them require grad."""

    def __init__(self, model: nn.Module) -> None:
        places: list[tuple[str, dict[str, Any], str]] = [
            (f"{path}.{key}" if path else key, module._parameters, key)
            for path, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.names = [name for name, _, _ in places]
        self.holders, self.keys = [values for _, values, _ in places], [key for *_, key in places]
        self.known: list[nn.Parameter] = [*map(getitem, self.holders, self.keys)]
        self._note()
        self.kinds = [_kind(parameter) for parameter in self.known]
        self.tied = _tied(self.known)
        # Of buffers only those that several names share: others are looked up by name.
        shared: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    shared.setdefault(id(buffer), []).append((module._buffers, name))
        self.shared = [places for places in shared.values() if len(places) > 1]

    def _note(self) -> None:
        """Note which parameters are where."""
        self._now = list({id(values): values for values in self.holders}.values())
        self._then = [dict(values) for values in self._now]
        single = [place for place, p in enumerate(self.known) if p.numel() == 1]
        self._single: list[list[Any]] = [
            [each[place] for place in single] for each in (self.holders, self.keys, self.known)
        ]

    def _are_known(self) -> bool:
        """Return whether every parameter is the same object as before."""
        # Dicts compare at the speed of C, by identity first. Two tensors that differ are then compared by
        # value, which raises for many elements; those of one element are looked at apart.
        try:
            same = self._now == self._then
        except Exception:  # noqa: BLE001 # whatever a comparison of two tensors raises
            return False
        holders, keys, known = self._single
        return same and all(map(is_, map(getitem, holders, keys), known))

    def flags(self, model: nn.Module) -> tuple[bool, ...]:
        """Return which parameters require grad now.

        Raises:
            PlanMismatch: one was removed, or another of another kind took its place.
        """
        if not self._are_known():
            now = [values.get(key) for values, key in zip(self.holders, self.keys, strict=True)]
            for name, parameter, kind in zip(self.names, now, self.kinds, strict=True):
                if parameter is None or _kind(parameter) != kind:
                    if parameter is not None:
                        got = f"{name!r} is {_kind(parameter)} now and was {kind}"
                    else:
                        got = (
                            f"{name!r} is no parameter of the model any more (weight_norm, spectral_norm, pruning and "
                            "parametrizations put others in the place of a weight)"
                        )
                    raise PlanMismatch(
                        f"planned {type(model).__name__}: {got}; call solve() and execute() again on the model as it is now"
                    )
            pairs = zip(self.names, self.tied, _tied(now), strict=True)
            apart = next((name for name, then, tied in pairs if then != tied), None)
            if apart is not None:
                raise PlanMismatch(
                    f"planned {type(model).__name__}: {apart!r} was tied to other parameters when the plan was made, and is "
                    "no longer so, or the other way round; call solve() and execute() again on the model as it is now"
                )
            self.known = now  # type: ignore[assignment] # none of them is None
            self._note()
        for places in self.shared:
            (first, key), *others = places
            if any(values.get(name) is not first.get(key) for values, name in others):
                raise PlanMismatch(
                    f"planned {type(model).__name__}: buffer {key!r} was shared by several modules when the plan was made, and "
                    "is no longer; call solve() and execute() again on the model as it is now"
                )
        return tuple(map(_requires_grad, self.known))

    def frozen(self, flags: Sequence[bool]) -> tuple[str, ...]:
        """Return the names of those that do not require grad; of tied ones, the first."""
        each = enumerate(zip(self.names, flags, self.tied, strict=True))
        return tuple(name for place, (name, flag, first) in each if not flag and first == place)


def _tied(parameters: Sequence[Any]) -> list[int]:
    """Return for each parameter, the first place of the same one."""
    first: dict[int, int] = {}
    return [first.setdefault(id(parameter), place) for place, parameter in enumerate(parameters)]


def _kind(parameter: Any) -> tuple[Any, ...]:
    return tuple(parameter.shape), parameter.dtype, parameter.device
