"""Devices are chosen, refused and used as the one module says."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merge_core import devices
from merge_core.devices import (
    CPU,
    VARIABLE,
    Device,
    choose_device,
    compute,
    current_device,
    use_device,
    use_process_device,
)
from merge_core.errors import DeviceError
from merge_core.executors.local import Serial, Threads
from tests.fake_accelerator import fake, only

FIRST, SECOND = Device("cuda:0", "First"), Device("cuda:1", "Second")
APPLE = Device("mps", "Apple", has_float64=False)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("auto", (FIRST, SECOND, APPLE, CPU), FIRST),
        ("auto", (APPLE, CPU), APPLE),
        ("auto", (CPU,), CPU),
        ("cpu", (FIRST, CPU), CPU),
        ("cuda", (FIRST, SECOND, CPU), FIRST),
        ("cuda:1", (FIRST, SECOND, CPU), SECOND),
        (" CUDA:1 ", (FIRST, SECOND, CPU), SECOND),
        ("mps", (APPLE, CPU), APPLE),
    ],
)
def test_the_device_that_is_named(name: str, there: tuple[Device, ...], expected: Device) -> None:
    assert choose_device(name, there) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tpu", "no device: take auto"),
        ("cuda:", "no device: take auto"),
        ("cuda:x", "no device: take auto"),
        ("", "no device: take auto"),
        ("gpu", "no device: take auto"),
        ("mps", "no MPS device here; take one of auto, cuda:0, cpu"),
        ("cuda:7", "no device cuda:7 here"),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(name: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words) as caught:
        choose_device(name, (FIRST, CPU))
    assert str(caught.value).count(". ") == 0


def test_the_environment_chooses_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (FIRST, SECOND, CPU))
    assert current_device() == FIRST
    monkeypatch.setenv(VARIABLE, "cuda:1")
    assert current_device() == SECOND
    with use_device(CPU):
        assert current_device() == CPU
    monkeypatch.setenv(VARIABLE, "cudda")
    with pytest.raises(DeviceError, match=r"\$MERGESCOPE_DEVICE names 'cudda'"):
        current_device()


def test_what_this_machine_has_ends_with_the_cpu() -> None:
    assert devices.find_devices()[-1] == CPU
    assert "core" in CPU.words()
    assert "GiB free" in CPU.words()


def test_the_choice_reaches_threads_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_devices", lambda: (FIRST, SECOND, CPU))
    with use_device(SECOND):
        for where in (Serial(), Threads(2)):
            assert list(where.map(lambda _: current_device(), range(3))) == [SECOND] * 3
    with use_process_device("cuda:1") as device:
        assert device == SECOND
        assert os.environ[VARIABLE] == "cuda:1"
        with ThreadPoolExecutor(1) as pool:  # a thread that knows nothing of the choice
            assert pool.submit(current_device).result() == SECOND
    assert VARIABLE not in os.environ
    with use_process_device("cpu"):
        # A new process reads the variable, as every thread does that knows of no choice.
        code = "from merge_core.devices import current_device; print(current_device().name)"
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert said.stdout == "cpu\n"


def test_float64_goes_to_the_cpu_where_a_device_has_none() -> None:
    assert APPLE.exact == CPU
    assert FIRST.exact == FIRST
    with only(Device("mps", "Apple", has_float64=False)):
        assert compute(lambda device: device, exact=True) == CPU


def test_what_does_not_fit_there_is_computed_here() -> None:
    def full(tensor: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with only(fake(room=full)):
        got = compute(lambda device: device.fetch(device.send(torch.ones(3)) * 2))
    torch.testing.assert_close(got, torch.full((3,), 2.0))

    def broken(tensor: torch.Tensor) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with only(fake(room=broken)), pytest.raises(RuntimeError, match="illegal"):
        compute(lambda device: device.send(torch.ones(3)))


def test_the_fake_itself_refuses_to_mix() -> None:
    there = fake().send(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="two devices"):
        _ = there @ torch.ones(2, 2)
    assert not there.is_cpu
    torch.testing.assert_close(fake().fetch(there @ there), torch.full((2, 2), 2.0))
