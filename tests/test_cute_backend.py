"""`CuteBackend`: refusals with reasons, compiling for shipping, and a whole call from disk on the emulator."""
from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from backends import DeviceInfo, Fc2Problem, get
from backends.cute import backend as cute_backend
from backends.cute import cache
from backends.cute.budget import CuteTactic
from backends.tactic import Tactic

B200 = DeviceInfo("cuda", "NVIDIA B200", (10, 0), sm_count=148)
PROBLEM = Fc2Problem(8, 256, 2048, 8, capability=(10, 0))


def test_registered() -> None:
    assert isinstance(get("cute"), cute_backend.CuteBackend) and get("cute").tactic_type is CuteTactic


@pytest.mark.parametrize(
    ("device", "named"),
    [
        (DeviceInfo("cuda", "NVIDIA H200", (9, 0), 132), "SM 9.0"),
        (DeviceInfo("cuda", "RTX 5090", (12, 0), 170), "SM 12.0"),
        (DeviceInfo("cuda", "an AMD GPU", None), "cuda"),
        (DeviceInfo("cpu", "cpu"), "cpu"),
    ],
)
def test_other_devices_are_refused_by_name(device, named) -> None:
    support = get("cute").is_supported(device)
    assert not support and support.reason.endswith(f"this device is {named}")


def test_both_blackwell_data_center_parts_are_supported() -> None:
    pytest.importorskip("cutlass")
    assert get("cute").is_supported(B200)
    assert get("cute").is_supported(DeviceInfo("cuda", "NVIDIA B300", (10, 3), 148))


def test_a_missing_or_old_dsl_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(cute_backend.importlib.util, "find_spec", lambda name: None)
    cute_backend.dsl_support.cache_clear()
    try:
        support = get("cute").is_supported(B200)
        assert not support and "pip install 'nvidia-cutlass-dsl>=4.8'" in support.reason
        monkeypatch.setattr(cute_backend.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(cute_backend.metadata, "version", lambda name: "4.2.1")
        cute_backend.dsl_support.cache_clear()
        assert "the CuTe DSL is 4.2.1" in get("cute").is_supported(B200).reason

        def absent(name: str) -> str:
            raise cute_backend.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(cute_backend.metadata, "version", absent)
        cute_backend.dsl_support.cache_clear()
        assert "but not the CuTe DSL" in get("cute").is_supported(B200).reason
    finally:
        cute_backend.dsl_support.cache_clear()


def test_tactic_round_trip() -> None:
    tactic = CuteTactic(256, 128, 128, 2, 2, split_k=3, skip=True, pdl=True)
    assert CuteTactic.from_json(tactic.to_json()) == tactic
    assert Tactic.to_json(tactic)["backend"] == "cute"


def test_nothing_is_compiled_before_it_is_asked_for() -> None:
    assert not cute_backend.CuteBackend().is_compiled(PROBLEM, CuteTactic())


def run_module(*arguments: str, directory) -> str:
    environment = {**os.environ, "FC2_CACHE_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_call_with_a_kernel_from_disk(tmp_path) -> None:
    """Compile and keep in this process; load, launch and check in another, through `CuteBackend.run` itself."""
    pytest.importorskip("cutlass")
    from backends.cute.compiler import compile_object
    from tests import cute_emulation, cute_shim

    if cute_shim.library() is None:
        pytest.skip("no C compiler for the stand-in runtime")
    kernel = replace(cute_shim.TACTIC, split_k=1)
    key = cache.kernel_key(kernel, "bfloat16", "sm_100a")
    path = cache.KernelCache(tmp_path / "cute").find_or_make(
        key, lambda: compile_object(kernel, "bfloat16", "sm_100a")
    )
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(cute_emulation.compiled(kernel, "bfloat16").__ptx__)
    before = path.stat().st_mtime_ns
    run_module("tests.cute_shim", "check", str(ptx), directory=tmp_path)
    assert path.stat().st_mtime_ns == before, "the other process compiled again"


def test_object_for_another_machine() -> None:
    pytest.importorskip("cutlass")
    from backends.cute.compiler import compile_object

    if platform.machine() != "x86_64":
        pytest.skip("the DSL cross-compiles host code to aarch64 only")
    # GB300: a Grace host (ELF machine 183) and an SM 10.3 GPU.
    content = compile_object(CuteTactic(128, 64, 128), "bfloat16", "sm_103a", "aarch64")
    assert content[:4] == b"\x7fELF" and int.from_bytes(content[18:20], "little") == 183
    assert compile_object(CuteTactic(128, 64, 128), "bfloat16", "sm_100a", "x86_64")[18:20] == b"\x3e\0"


@pytest.mark.full
def test_command_line(tmp_path) -> None:
    pytest.importorskip("cutlass")
    assert "6 kernels for sm_103a" in run_module("backends.cute", "compile", "--arch", "sm_103a", directory=tmp_path)
    assert len(list((tmp_path / "cute").glob(f"sm_103a-{platform.machine()}-*-bfloat16-*.o"))) == 6


@pytest.mark.parametrize("name", ["a.data", "a.scale", "b.data", "b.scale", "out"])
def test_misaligned_memory_is_an_error(monkeypatch, name) -> None:
    cute = cute_backend.CuteBackend()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cute, "_prepare_call", lambda *_: (None, (), 0, 0))

    def memory(own: str) -> torch.Tensor:
        return torch.zeros(1024, dtype=torch.uint8)[3 if own == name else 0 :]

    a, b = (SimpleNamespace(data=memory(f"{x}.data"), scale=memory(f"{x}.scale")) for x in "ab")
    with pytest.raises(ValueError, match=f"^{name} starts 3 bytes past a multiple of 16"):
        cute.run(PROBLEM, CuteTactic(), a, b, torch.zeros(8, 8), memory("out"))


def test_counters_of_streams_and_graphs(monkeypatch) -> None:
    """Calls on a stream share counters; each captured call has its own, until the pool ends; all start at zero."""
    cute = cute_backend.CuteBackend()
    device = torch.device("cpu", 0)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first = cute._counters(device, 7, 56)
    assert cute._counters(device, 7, 112).data_ptr() == first.data_ptr()
    assert cute._counters(device, 8, 56).data_ptr() != first.data_ptr()
    assert not first.any() and first.numel() >= 4096
    assert cute._counters(device, 7, 5000).numel() == 5000
    capturing = True
    cute._graph_counters[0] = (torch.zeros(100, dtype=torch.int32), 0)
    taken = [cute._counters(device, 7, 40) for _ in range(3)]
    assert [t.numel() for t in taken] == [40, 40, 40]
    assert len({t.data_ptr() for t in taken}) == 3
    pool = cute._graph_counters[0][0]
    assert [taken[0].data_ptr(), taken[1].data_ptr()] == [pool.data_ptr(), pool.data_ptr() + 160]
