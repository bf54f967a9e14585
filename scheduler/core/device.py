"""Describe a device in numbers, so that a plan can be made without it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["DeviceSpec"]

DEVICE_KINDS = ("cuda", "cpu")
GB = 10**9
HOPPER_WORKSPACE = 32 * 2**20
CUBLAS_WORKSPACE = 8_519_680


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as the roofline and the allocator's rules see it.

    The built-in ones (``DeviceSpec.of``) have the public data sheets' peak rates, without sparsity. Real
    kernels reach about the same part of them, so that ratios of seconds are better than the seconds.

    Attributes:
        name: for people.
        memory: bytes. Of the built-in ones, the data sheet's GB taken as 10^9: devices report a few per cent
            more, of which the CUDA context takes some.
        bandwidth: of the memory, bytes per second.
        flops: floating-point operations per second, by the name of the dtype ("float32", "bfloat16", ...). A
            dtype that is missing gets the rate of float32, which is without TF32, as torch multiplies by
            default.
        launch: seconds that any op takes at least. An order of magnitude: a kernel's launch is 2 to 10
            microseconds.
        kind: whose allocator's rules hold: "cuda" (512-byte blocks) or "cpu".
        workspace: bytes that cuBLAS takes once and keeps, in its default configuration. A step has two such:
            one of the thread that runs the forward, one of autograd's.
        expandable_segments: whether training will run with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
            Without it CUDA's allocator gives large tensors up to 1 MiB too much, for which some bytes are set
            aside.
        source: of the figures.
    """

    name: str
    memory: int
    bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    launch: float = 5e-6
    kind: str = "cuda"
    workspace: int = CUBLAS_WORKSPACE
    expandable_segments: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        def positive(value: object) -> bool:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator] # a number, as seen

        if not isinstance(self.flops, Mapping):
            raise TypeError(
                f"DeviceSpec: flops is a {type(self.flops).__name__}, expected a dict such as {{'float32': 19.5e12}}"
            )
        if "float32" not in self.flops or not all(map(positive, self.flops.values())):
            raise ValueError(
                f"DeviceSpec: flops={dict(self.flops)}, expected positive rates by dtype, 'float32' among them"
            )
        for name in ("memory", "bandwidth"):
            if not positive(getattr(self, name)):
                raise ValueError(f"DeviceSpec: {name}={getattr(self, name)!r}, expected a positive number")
        if self.launch < 0 or self.workspace < 0:
            raise ValueError(
                f"DeviceSpec: launch={self.launch!r}, workspace={self.workspace!r}, expected none below 0"
            )
        if not isinstance(self.expandable_segments, bool):
            raise TypeError(
                f"DeviceSpec: expandable_segments={self.expandable_segments!r}, expected True or False"
            )
        if self.kind not in DEVICE_KINDS:
            raise ValueError(f"DeviceSpec: kind={self.kind!r}, expected one of {', '.join(DEVICE_KINDS)}")
        object.__setattr__(self, "memory", int(self.memory))
        object.__setattr__(self, "flops", MappingProxyType(dict(self.flops)))

    def rate(self, dtype: str) -> float:
        """Return floating-point operations per second on numbers of a dtype."""
        return self.flops.get(dtype, self.flops["float32"])

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the devices that are built in."""
        return tuple(_BUILT_IN)

    @classmethod
    def of(cls, device: str | DeviceSpec) -> DeviceSpec:
        """Return the built-in device of that name (in any case), or a DeviceSpec as it is.

        Raises:
            TypeError: neither a name nor a DeviceSpec.
            ValueError: no such device is built in; names the ones that are.
        """
        if isinstance(device, DeviceSpec):
            return device
        if not isinstance(device, str):
            raise TypeError(
                f"device is a {type(device).__name__}, expected a name such as 'H100' or a rematplan.DeviceSpec"
            )
        known = {name.lower(): spec for name, spec in _BUILT_IN.items()}
        if device.lower() not in known:
            near = difflib.get_close_matches(device.lower(), known, n=1)
            meant = f" (did you mean {known[near[0]].name!r}?)" if near else ""
            raise ValueError(
                f"device={device!r} is not built in{meant}; choose one of {', '.join(_BUILT_IN)}, or describe it: "
                "rematplan.DeviceSpec(name, memory=bytes, bandwidth=bytes_per_second, flops={'float32': ..., "
                "'bfloat16': ...})"
            )
        return known[device.lower()]


def _nvidia(
    name: str, gigabytes: int, bandwidth: float, workspace: int = CUBLAS_WORKSPACE, **tera: float
) -> DeviceSpec:
    """Describe a card by the figures of its data sheet: GB, GB/s, and TFLOP/s by dtype."""
    return DeviceSpec(
        name,
        gigabytes * GB,
        bandwidth * 1e9,
        {dtype: rate * 1e12 for dtype, rate in tera.items()},
        workspace=workspace,
        source=f"NVIDIA's data sheet of the {name}, dense peak rates",
    )


# Data sheets give rates with sparsity for some; these are half of those.
_BUILT_IN = {
    spec.name: spec
    for spec in (
        _nvidia("H100", 80, 3350, HOPPER_WORKSPACE, float64=33.5, float32=67.0, bfloat16=989.5, float16=989.5),
        _nvidia("H100-PCIe", 80, 2000, HOPPER_WORKSPACE, float64=25.6, float32=51.2, bfloat16=756.5, float16=756.5),
        _nvidia("H200", 141, 4800, HOPPER_WORKSPACE, float64=33.5, float32=67.0, bfloat16=989.5, float16=989.5),
        _nvidia("A100-80GB", 80, 2039, float64=9.7, float32=19.5, bfloat16=312.0, float16=312.0),
        _nvidia("A100-40GB", 40, 1555, float64=9.7, float32=19.5, bfloat16=312.0, float16=312.0),
        _nvidia("L40S", 48, 864, float32=91.6, bfloat16=362.0, float16=362.0),
        _nvidia("L4", 24, 300, float32=30.3, bfloat16=121.0, float16=121.0),
        _nvidia("RTX 4090", 24, 1008, float32=82.6, bfloat16=165.2, float16=165.2),
        _nvidia("RTX 3090", 24, 936, float32=35.6, bfloat16=71.0, float16=71.0),
        _nvidia("T4", 16, 320, float32=8.1, float16=65.0),
        _nvidia("V100-32GB", 32, 900, float64=7.8, float32=15.7, float16=125.0),
    )
}  # fmt: skip # a table
