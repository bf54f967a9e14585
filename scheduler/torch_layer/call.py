"""Bring calls of the model into one canonical form, describe them, and refuse what cannot be planned.

A call can be written in many ways (positional, by keyword, with defaults spelled out). The canonical form
binds the arguments to the parameter names of ``model.forward``, so that the plan's sample and every later
training call can be compared.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.core.errors import PlanMismatch
from rematplan.scheduler.torch_layer.fsdp import placement, reject_tensor_parallel, reject_wrapped, reshard
from rematplan.scheduler.torch_layer.layouts import is_strided, room, unusual
from rematplan.scheduler.torch_layer.leaves import tensors_in, tree_flatten, tree_leaves

__all__ = [
    "CallReader",
    "CallSignature",
    "canonical_call",
    "forward_signature",
    "kind_of",
    "model_fingerprint",
    "nothing_to_train",
    "read_sample",
    "reject_unusable",
    "reject_unusual",
    "unplanned",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def read_sample(sample: Any) -> Call:
    """Return ``sample`` as ``(args, kwargs)``.

    Args:
        sample: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a pair
            ``(args, kwargs)`` of a tuple and a mapping.

    Raises:
        TypeError: anything else.
    """
    if isinstance(sample, torch.Tensor):
        return (sample,), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, (tuple, list)):
        if len(sample) == 2 and isinstance(sample[0], (tuple, list)) and isinstance(sample[1], Mapping):
            return tuple(sample[0]), dict(sample[1])
        return tuple(sample), {}
    raise TypeError(
        f"solve: sample is a {type(sample).__name__}; pass a tensor, a tuple of positional arguments, "
        "a dict of keyword arguments, or (args, kwargs)"
    )


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of the model's forward.

    It names ``use_cache`` where transformers passes that on in ``**kwargs``, its default being in the model's
    configuration.
    """
    signature = inspect.signature(model.forward)
    names = signature.parameters
    rest = [p for p in names.values() if p.kind is p.VAR_KEYWORD]
    config = getattr(model, "config", None)
    configs = (config, *getattr(config, "__dict__", {}).values())  # a composite model has nested ones
    if not rest or "use_cache" in names or not any(getattr(c, "use_cache", None) is True for c in configs):
        return signature
    cache = inspect.Parameter("use_cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*(p for p in names.values() if p not in rest), cache, *rest])


def canonical_call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return ``(args, kwargs)`` with every argument by name where it has one, in the order of the signature.

    Arguments that repeat a default of None are dropped. ``use_cache`` is False unless given: a training step
    never reads the cache, and its tensors would outlive the step.

    Raises:
        TypeError: the arguments do not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    # Everything before *args must stay positional if *args is used.
    starred = any(
        p.kind is p.VAR_POSITIONAL and bound.arguments.get(n) for n, p in signature.parameters.items()
    )
    for name, parameter in signature.parameters.items():
        if name not in bound.arguments:
            if name == "use_cache":
                named[name] = False
            continue
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(value)
            starred = False
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(sorted(value.items()))
        elif parameter.kind is parameter.POSITIONAL_ONLY or (
            starred and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ):
            positional.append(value)
        elif not (value is None and parameter.default is None):
            named[name] = value
    if named.get("use_cache", None if "use_cache" in signature.parameters else ...) is None:
        named["use_cache"] = False
    return tuple(positional), named


class CallReader:
    """``canonical_call`` for one signature, faster for calls that are written like an earlier one."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        # How a call is written -> (index in it, or None and a value that is not in it) of each argument.
        self._known: dict[Any, tuple[list[tuple[int | None, Any]], list[tuple[str, int | None, Any]]]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """See ``canonical_call``."""
        given = [*args, *kwargs.values()]
        written = (len(args), *kwargs, *[value is None for value in given])
        if written not in self._known:
            marks = [None if value is None else object() for value in given]
            by_name = dict(zip(kwargs, marks[len(args) :], strict=True))
            canonical = canonical_call(self.signature, tuple(marks[: len(args)]), by_name)
            places = {id(mark): i for i, mark in enumerate(marks) if mark is not None}
            self._known[written] = (
                [(places.get(id(value)), value) for value in canonical[0]],
                [(name, places.get(id(value)), value) for name, value in canonical[1].items()],
            )
        positional, named = self._known[written]
        return (
            tuple([value if place is None else given[place] for place, value in positional]),
            {name: value if place is None else given[place] for name, place, value in named},
        )


def _describe(leaf: Any) -> list[Any]:
    """Return a JSON-ready description of one leaf of the arguments."""
    if isinstance(leaf, torch.Tensor):
        described = ["tensor", list(leaf.shape), str(leaf.dtype), leaf.device.type, leaf.requires_grad]
        sparse = room(leaf)  # of which the bytes of a sparse tensor depend
        return described if sparse is None else [*described, str(leaf.layout), sparse]
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return ["value", leaf]
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    if isinstance(leaf, torch.Generator):
        return ["generator", str(leaf.device)]
    if kind == "numpy.ndarray":
        return ["array", list(leaf.shape), str(leaf.dtype), hashlib.sha256(leaf.tobytes()).hexdigest()]
    text = repr(leaf)
    # Objects of one kind are told apart by their ``repr``, unless that shows an address.
    return ["object", kind, kind if " at 0x" in text and not callable(leaf) else text]


@dataclass(frozen=True)
class CallSignature:
    """Structure, shapes, dtypes and devices of a canonical call; plain values by value.

    Attributes:
        structure: the tree of the arguments, as text.
        leaves: JSON text, one description per leaf.
    """

    structure: str
    leaves: str

    @classmethod
    def of(cls, call: Call) -> CallSignature:
        """Return the signature of a canonical call."""
        flat, spec = tree_flatten(call)
        return cls(str(spec), json.dumps([_describe(leaf) for leaf in flat]))

    @functools.cached_property
    def described(self) -> list[list[Any]]:
        """The ``leaves``, parsed."""
        found: list[list[Any]] = json.loads(self.leaves)
        return found

    def trains_input(self) -> bool:
        """Whether a tensor of the call requires grad."""
        return any(kind == "tensor" and what[3] for kind, *what in self.described)

    def check(self, call: Call, where: str) -> None:
        """Compare with the signature of another call.

        Raises:
            PlanMismatch: they differ; the message shows the first difference.
        """
        other = CallSignature.of(call)
        if other == self:
            return
        leaf, want, got = self._first_difference(other)
        if leaf is None:
            raise PlanMismatch(
                f"{where}: the plan was made for arguments {want}, got {got}; "
                "call solve() with a sample of this structure"
            )
        raise PlanMismatch(
            f"{where}: argument leaf {leaf}: the plan was made for {want}, got {got}; "
            "call solve() with a sample like this one and execute that plan for such batches"
        )

    def difference(self, other: CallSignature) -> str:
        """Return the first difference of another signature from this one, in words."""
        leaf, want, got = self._first_difference(other)
        return f"{'arguments' if leaf is None else f'argument leaf {leaf}'}: {got} instead of {want}"

    def _first_difference(self, other: CallSignature) -> tuple[int | None, str, str]:
        """Return (leaf, here, there) of the first difference, in words; no leaf if structures differ."""
        if other.structure != self.structure:
            return None, self.structure, other.structure
        pairs = enumerate(zip_longest(self.described, other.described, fillvalue=["nothing"]))
        # As text, for True is not 1.
        different = next(((i, a, b) for i, (a, b) in pairs if json.dumps(a) != json.dumps(b)), None)
        if different is None:  # equal, as different JSON
            return None, self.leaves, other.leaves
        leaf, want, got = different
        return leaf, _words(want), _words(got)


def _words(leaf: list[Any]) -> str:
    if leaf[0] == "tensor" and len(leaf) in (5, 7) and isinstance(leaf[1], list):
        grad = ", requires_grad" if leaf[4] else ""
        sparse = f", {leaf[5]} with up to {leaf[6]} elements" if len(leaf) > 5 else ""
        return f"a tensor of shape {tuple(leaf[1])}, {leaf[2]} on {leaf[3]}{sparse}{grad}"
    return repr(leaf[-1])


def model_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the model's class and of names, shapes, dtypes and devices of its tensors.

    Of sharded tensors also of their placement on the mesh of devices, which is the same on every rank; not of
    values, which change in training.
    """
    reshard(model)
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            row = (kind, name, tuple(tensor.shape), str(tensor.dtype), tensor.device.type)
            mesh = placement(tensor)
            digest.update(repr((*row, mesh) if mesh else row).encode())
    return digest.hexdigest()


def unplanned(model: Any) -> Any:
    """Return the plain model of one that already trains by a plan; any other model itself."""
    plain = getattr(type(model), "_rematplan_plain", None)
    return model if plain is None else plain(model)


def reject_unusual(call: Call) -> None:
    """Refuse tensors whose bytes are unknown, before anything is run.

    Raises:
        ValueError: the call holds one; says what to pass instead.
    """
    for index, leaf in enumerate(tree_leaves(call)):
        what = unusual(leaf) if isinstance(leaf, torch.Tensor) else None
        if what is not None:
            raise ValueError(
                f"solve: argument leaf {index} of the sample is {what}, which cannot be planned; pass its values and offsets "
                "(or a padded tensor and its lengths), and make the nested tensor in forward"
            )


def kind_of(leaf: Any) -> Any:
    """Return a key of one leaf, by which calls need different plans: of a tensor everything but its values.

    Raises:
        PlanMismatch: a nested tensor, say, which cannot be planned for.
    """
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf  # True is not 1
    if is_strided(leaf):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    what = unusual(leaf)
    if what is not None:
        raise PlanMismatch(
            f"an argument is {what}, which no plan is for; pass its values and offsets, and make the nested tensor in forward"
        )
    return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.layout, room(leaf)


def nothing_to_train(model: nn.Module, call: Call) -> str:
    """Return the advice if no parameter or tensor of the sample requires grad; "" if one does."""
    if any(t.requires_grad for t in (*model.parameters(), *tensors_in(call))):
        return ""
    return (
        "solve: no parameter of the model requires grad, nor does a tensor of the sample, so there is no backward to plan; "
        "call model.requires_grad_(True), unfreeze what you train, or pass the input that you train as it is in training, "
        "with requires_grad"
    )


def reject_unusable(model: Any) -> None:
    """Refuse a model that cannot be planned, before anything is changed.

    Raises:
        TypeError: it is not an nn.Module.
        ValueError: it is in eval mode, or a wrapper that belongs around a planned model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"solve: model is a {type(model).__name__}, expected a torch.nn.Module")
    reject_wrapped("solve", model)
    reject_tensor_parallel(model)
    reshard(model)
    if not model.training:
        raise ValueError(
            "solve: the model is in eval mode; call model.train() first, plans are for training steps"
        )
