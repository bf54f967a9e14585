"""Descriptions of devices: the built-in ones, and those that are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rematplan import DeviceSpec


def test_built_in_devices_are_found_by_name_in_any_case() -> None:
    assert DeviceSpec.of("h100") is DeviceSpec.of("H100")
    assert len(DeviceSpec.names()) >= 8
    for name in DeviceSpec.names():
        spec = DeviceSpec.of(name)
        assert (spec.name, spec.kind) == (name, "cuda")
        assert spec.memory >= 16e9
        assert spec.source
        assert DeviceSpec.of(spec) is spec
        assert hash(spec) == hash(DeviceSpec.of(name))


def test_hopper_keeps_a_larger_workspace() -> None:
    assert DeviceSpec.of("H200").workspace == 32 * 2**20
    assert DeviceSpec.of("A100-80GB").workspace == 8_519_680


def test_a_dtype_without_a_rate_has_that_of_float32() -> None:
    spec = DeviceSpec.of("T4")
    assert spec.rate("float16") == 65e12
    assert spec.rate("bfloat16") == spec.rate("float32") == 8.1e12


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"device='H10' is not built in \(did you mean 'H100'\?\); choose one of H100"
    ):
        DeviceSpec.of("H10")
    with pytest.raises(TypeError, match="device is a int"):
        DeviceSpec.of(3)  # type: ignore[arg-type] # the point


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"memory": 0}, "memory=0"),
        ({"bandwidth": float("inf")}, "bandwidth=inf"),
        ({"flops": {"bfloat16": 1e12}}, "'float32' among them"),
        ({"flops": {"float32": -1.0}}, "positive rates"),
        ({"kind": "tpu"}, "kind='tpu'"),
        ({"launch": -1.0}, "launch=-1.0"),
    ],
)
def test_nonsense_is_refused(changed: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"memory": 10**9, "bandwidth": 1e11, "flops": {"float32": 1e12}}
    with pytest.raises(ValueError, match=message):
        DeviceSpec("mine", **(good | changed))  # type: ignore[arg-type] # the point


def test_a_table_of_rates_is_asked_for() -> None:
    with pytest.raises(TypeError, match="flops is a float"):
        DeviceSpec("mine", 10**9, 1e11, 1e12)  # type: ignore[arg-type] # the point


def test_descriptions_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from rematplan import DeviceSpec; print(DeviceSpec.of('L4').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "L4"
