"""Targets of `moecast compile`: what they mean, and what is said of those that do not exist."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import resolve_cluster
from trainer.targets import Target, TargetError, check_libtpu, child_environment, parse_target, run_child


@pytest.mark.parametrize(
    ("text", "name", "devices", "cluster"),
    [
        ("cpu:8", "cpu:8", 8, {"chip": "cpu-host", "devices": 8}),
        ("tpu:v5p:4x4x4", "tpu:v5p:4x4x4", 64, {"chip": "tpu-v5p", "slice": "4x4x4"}),
        ("tpu:v3:4x4", "tpu:v3:4x4", 32, {"chip": "tpu-v3", "slice": "4x4"}),
        ("tpu:v4:4x4x4", "tpu:v4:4x4x4", 64, {"chip": "tpu-v4", "slice": "4x4x4"}),
        ("TPU:v6e:8x8", "tpu:v6e:8x8", 64, {"chip": "tpu-v6e", "slice": "8x8"}),
        ("tpu:7x:2x2x1", "tpu:7x:2x2x1", 8, {"chip": "tpu7x", "slice": "2x2x1"}),
        ("tpu:tpu7x:1x2x2", "tpu:7x:2x2x1", 8, {"chip": "tpu7x", "slice": "2x2x1"}),
    ],
)
def test_a_target_is_so_many_devices_and_a_cluster(
    text: str, name: str, devices: int, cluster: dict[str, object]
) -> None:
    target = parse_target(text)
    assert (target.name, target.devices, target.cluster) == (name, devices, cluster)
    assert resolve_cluster(cluster).devices == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpv:v5p:2x2x1", "unknown platform 'tpv'; did you mean 'tpu'?"),
        ("gpu:8", "unknown platform 'gpu'; write cpu:8, or tpu:v5p:4x4x4"),
        ("v5p:4x4x4", "no platform named; did you mean 'tpu:v5p:4x4x4'?"),
        ("", "unknown platform ''; write cpu:8, or tpu:v5p:4x4x4"),
        ("cpu:0", "cpu: needs the number of devices, 1 to 1024; such as cpu:8"),
        ("cpu", "cpu: needs the number of devices"),
        ("tpu:v5:4x4", "unknown TPU generation 'v5'; did you mean 'v5"),
        ("tpu:v5p", "no slice named; such as tpu:v5p:2x2x1"),
        ("tpu:v5p:4x4x5", "tpu-v5p has no such slice; nearest: "),
        ("tpu:v5p:v6e-4", "a slice of tpu-v6e, not of tpu-v5p"),
    ],
)
def test_a_target_that_is_none_is_one_line_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(QuestionError) as error:
        parse_target(text)
    assert str(error.value).startswith("target = ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_libtpu_absent_or_of_another_version_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"', "numpy>=2"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.42.7")
    check_libtpu()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.421")
    with pytest.raises(TargetError, match=r"libtpu 0\.0\.421 is not the 0\.0\.42\.\* .*pip install 'moecast\[tpu\]'"):
        check_libtpu()
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(TargetError, match=r"needs libtpu.*pip install 'moecast\[tpu\]'"):
        check_libtpu()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"needs JAX.*pip install 'moecast\[tpu\]'"):
        check_libtpu()


def test_a_child_gets_the_devices_and_keeps_other_flags() -> None:
    given = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=2", "HOME": "x"}
    assert child_environment(parse_target("cpu:8"), given) == {
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8",
        "HOME": "x",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def test_a_child_passes_its_exit_code_on_and_is_ended_when_it_takes_too_long() -> None:
    target = Target("cpu:3", "cpu", 3)
    code = "import os, sys; sys.exit(int(os.environ['XLA_FLAGS'][-1]))"
    assert run_child(target, ["-c", code], 60) == 3
    with pytest.raises(TargetError, match=r"cpu:3: compiling took longer than 0\.2 s"):
        run_child(target, ["-c", "import time; time.sleep(60)"], 0.2)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed (extra `train`)")
def test_too_few_host_devices_names_the_flag() -> None:
    code = (
        "from trainer.targets import TargetError, parse_target\n"
        "assert len(parse_target('cpu:4').jax_devices()) == 4\n"
        "try:\n    parse_target('cpu:5').jax_devices()\n"
        "except TargetError as error:\n    assert 'device_count=5' in str(error), error\n"
    )
    assert run_child(parse_target("cpu:4"), ["-c", code], 120) == 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None,
    reason="libtpu, the TPU compiler, is not installed (extra `tpu`)",
)
def test_libtpu_makes_the_devices_that_a_target_says() -> None:
    names = ["v2:2x2", "v3:4x4", "v4:2x2x2", "v5e:1x1", "v5e:4x4", "v5p:2x2x4", "v6e:8x8", "7x:1x1x1", "7x:2x2x1"]
    code = (
        "import sys; from trainer.targets import parse_target\n"
        "for name in sys.argv[1:]:\n"
        "    devices = parse_target('tpu:' + name).jax_devices()\n"
        "    assert len(devices) == parse_target('tpu:' + name).devices and devices[0].platform == 'tpu', name\n"
    )
    assert run_child(parse_target("tpu:v3:4x4"), ["-c", code, *names], 120) == 0


def test_the_reader_imports_no_jax() -> None:
    code = "import sys, trainer.hlo, trainer.targets; sys.exit('jax' in sys.modules)"
    assert run_child(Target("cpu:1", "cpu", 1), ["-c", code], 60) == 0
