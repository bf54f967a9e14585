"""``Rematerialize``: a Lightning callback that trains a LightningModule within a memory budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rematplan.executors.execute import execute
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.solve import solve

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "rematplan.executors.lightning needs Lightning, which is not installed; install 'lightning' or 'pytorch-lightning'"
        ) from error

__all__ = ["Rematerialize"]


class Rematerialize(Callback):
    """Plan a module of the LightningModule at the first training batch, and train by the plan.

    The plan is made in the forward of that batch, with its arguments and in the autocast context of the
    trainer's precision; the optimizer's state counts. Parameters, ``state_dict`` and checkpoints stay those
    of the plain module, which is restored when the fit ends. Other shapes are planned when they occur.

    Args:
        memory_budget: bytes of a whole training step, as ``rematplan.solve`` takes it.
        module: name of the submodule to plan, whose output the loss is computed from. Default: the only child
            that has parameters.
        options: further arguments of ``rematplan.solve``, such as ``capture=``.

    Attributes:
        plan: the plan, from the first batch on.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: when the fit starts: no such submodule, or several children with parameters.
    """

    def __init__(self, memory_budget: int | str, *, module: str | None = None, **options: Any) -> None:
        self.memory_budget = memory_budget
        self.module = module
        self.options = options
        self.plan: Plan | None = None
        self._parent: nn.Module | None = None
        self._name = ""
        self._plain: nn.Module | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Intercept the module's first training forward."""
        path = self.module if self.module is not None else _only_child(pl_module)
        parent, _, self._name = path.rpartition(".")
        try:
            self._parent = pl_module.get_submodule(parent)
            plain = self._plain = self._parent.get_submodule(self._name)
        except AttributeError as error:
            raise ValueError(
                f"Rematerialize: module={path!r} is no submodule of {type(pl_module).__name__}; pass one of "
                f"{', '.join(name for name, _ in pl_module.named_children())}"
            ) from error
        forward = plain.forward

        def first(*args: Any, **kwargs: Any) -> Any:
            if not plain.training or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            del plain.__dict__["forward"]
            optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
            sample = (args, kwargs)
            self.plan = solve(plain, self.memory_budget, sample=sample, optimizer=optimizer, **self.options)
            planned = execute(self.plan, plain)
            setattr(self._parent, self._name, planned)
            return planned.forward(*args, **kwargs)  # the hooks of this call run around it already

        plain.forward = first

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 # Lightning's
        """Put the plain module back."""
        self._restore()

    def on_exception(self, *_: Any, **__: Any) -> None:
        """Put the plain module back where the fit fails."""
        self._restore()

    def _restore(self) -> None:
        if self._parent is not None and self._plain is not None:
            self._plain.__dict__.pop("forward", None)
            self._plain.train(getattr(self._parent, self._name).training)
            setattr(self._parent, self._name, self._plain)
            self._parent = self._plain = None


def _only_child(module: nn.Module) -> str:
    found = [
        name for name, child in module.named_children() if any(p.requires_grad for p in child.parameters())
    ]
    if len(found) != 1:
        raise ValueError(
            f"Rematerialize: {type(module).__name__} has {len(found)} children with parameters ({', '.join(found)}); say "
            "which is to be planned, for instance module='model'"
        )
    return found[0]
