"""The emulator on kernels written in the CuTe DSL: interception of the host function, arguments, several
launches."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed (it has Linux wheels only)")

import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import make_ptr  # noqa: E402

from .emulator import Fault, Report, compile_target, device_tensor, emulate  # noqa: E402


@cute.kernel
def scale_kernel(x: cute.Tensor, factor: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    at = block * 64 + thread
    x[at] = x[at] * factor


@cute.jit
def scale_twice(x: cute.Tensor, factor: cutlass.Float32):
    scale_kernel(x, factor).launch(grid=[2, 1, 1], block=[64, 1, 1])
    scale_kernel(x, factor).launch(grid=[2, 1, 1], block=[64, 1, 1])


@cute.kernel
def copy_kernel(source: cute.Tensor, target: cute.Tensor, count: cutlass.Int32):
    thread, _, _ = cute.arch.thread_idx()
    if thread < count:
        target[thread] = source[thread]


@cute.jit
def copy(source: cute.Pointer, target: cute.Pointer, count: cutlass.Int32):
    layout = cute.make_layout((count,))
    copy_kernel(cute.make_tensor(source, layout), cute.make_tensor(target, layout), count).launch(
        grid=[1, 1, 1], block=[128, 1, 1]
    )


@pytest.fixture(scope="module")
def compiled_scale():
    with compile_target():
        return cute.compile(scale_twice, device_tensor(torch.zeros(128)), cutlass.Float32(0))


@pytest.mark.parametrize("arch,major_minor,sms", [("sm_90a", (9, 0), 132), ("sm_100a", (10, 0), 148)])
def test_the_host_code_sees_the_target(arch: str, major_minor: tuple[int, int], sms: int) -> None:
    """Compute capability, SM count and entry registers reach the DSL's host code and the launch."""
    from .emulator import interception

    with compile_target(arch):
        compiled = cute.compile(scale_twice, device_tensor(torch.zeros(128)), cutlass.Float32(0))
    api, answer = compiled.engine._emulator_api, ctypes.c_int32()
    answers = []
    for attribute in (interception._ATTR_CC_MAJOR, interception._ATTR_CC_MINOR, interception._ATTR_SM_COUNT):
        api._device_attribute(ctypes.addressof(answer), attribute, 0)
        answers.append(answer.value)
    assert answers == [*major_minor, sms]
    x = torch.arange(128.0)
    emulate(compiled, x, cutlass.Float32(3))
    assert torch.equal(x, 9 * torch.arange(128.0))
    assert len(api.registers) == 2 and all(8 <= n <= 255 for n in api.registers.values())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120a"])
def test_other_targets_are_refused(arch: str) -> None:
    with pytest.raises(ValueError, match=f"arch '{arch}': the emulator models sm_100a and sm_90a"):
        with compile_target(arch):
            pass


@pytest.fixture(scope="module")
def compiled_copy():
    with compile_target():
        pointer = make_ptr(cutlass.Float32, 16, cute.AddressSpace.gmem, assumed_align=16)
        return cute.compile(copy, pointer, pointer, cutlass.Int32(1))


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_two_launches_of_one_host_call(compiled_scale, schedule: str) -> None:
    x = torch.arange(128.0)
    report = emulate(compiled_scale, x, cutlass.Float32(3), schedule=schedule)
    assert torch.equal(x, 9 * torch.arange(128.0))
    assert isinstance(report, Report) and len(report.launches) == 2
    launch = report.launches[0]
    assert (launch.grid, launch.block, launch.cluster) == ((2, 1, 1), (64, 1, 1), (1, 1, 1))
    assert launch.loads == launch.stores == {"arg0": 512} and set(launch.warp_instructions) == {0, 1}


def _pointer(tensor: torch.Tensor):
    return make_ptr(cutlass.Float32, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=16)


def test_pointers_need_their_buffers(compiled_copy) -> None:
    source, target = torch.randn(100), torch.zeros(100)
    arguments = (_pointer(source), _pointer(target), cutlass.Int32(100))
    emulate(compiled_copy, *arguments, buffers={"source": source, "target": target})
    assert torch.equal(source, target)
    with pytest.raises(Fault, match="no registered buffer|out of bounds"):
        emulate(compiled_copy, *arguments, buffers={"source": source})


def test_one_element_too_far_is_found(compiled_copy) -> None:
    source, target = torch.randn(100), torch.zeros(100)
    with pytest.raises(Fault, match="400 bytes into buffer 'source' of 400 bytes"):
        emulate(
            compiled_copy,
            _pointer(source),
            _pointer(target),
            cutlass.Int32(101),
            buffers={"source": source, "target": target},
        )


def test_settings_of_the_dsl_are_restored() -> None:
    from cutlass._mlir.execution_engine import ExecutionEngine
    from cutlass.cutlass_dsl import CuTeDSL

    env, make = CuTeDSL._get_dsl().envar, ExecutionEngine.__init__
    before = (env._arch, env.keep_ptx, env.dump_dir)
    with compile_target():
        assert env.arch == "sm_100a" and ExecutionEngine.__init__ is not make
    assert (env._arch, env.keep_ptx, env.dump_dir) == before and ExecutionEngine.__init__ is make


def test_a_call_outside_emulate_fails(compiled_scale, capfd) -> None:
    with pytest.raises(Exception, match="999|cudaErrorUnknown"):
        compiled_scale(device_tensor(torch.zeros(128)), cutlass.Float32(1))


def test_wrong_arguments_are_named(compiled_scale) -> None:
    with pytest.raises(ValueError, match="schedule 'later': must be"):
        emulate(compiled_scale, torch.zeros(128), cutlass.Float32(1), schedule="later")
    with pytest.raises(TypeError, match=r"buffers\['x'\] is a list"):
        emulate(compiled_scale, torch.zeros(128), cutlass.Float32(1), buffers={"x": [1]})


def test_running_a_file_that_expects_a_gpu(tmp_path: Path) -> None:
    """python -m tests.emulator FILE: "cuda" tensors, torch.cuda calls, from_dlpack."""
    script = tmp_path / "example.py"
    script.write_text(textwrap.dedent("""
        import sys
        import cutlass, cutlass.cute as cute, torch
        from cutlass.cute.runtime import from_dlpack

        @cute.kernel
        def kernel(x: cute.Tensor):
            thread, _, _ = cute.arch.thread_idx()
            x[thread] = x[thread] + cutlass.Float32(1)

        @cute.jit
        def host(x: cute.Tensor):
            kernel(x).launch(grid=[1, 1, 1], block=[32, 1, 1])

        assert torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10
        x = torch.zeros(32, device="cuda")
        host(from_dlpack(x))
        torch.cuda.synchronize()
        torch.testing.assert_close(x, torch.ones(32, device="cuda") * float(sys.argv[1]))
    """))
    root = Path(__file__).parents[1]
    for argument, code in (("1", 0), ("2", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "tests.emulator", "--schedule", "lazy", str(script), argument],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert "Tensor-likes are not close" in done.stderr
