"""The cache of compiled kernels: keys, seals, races. No DSL and no GPU, but for one compile."""
from __future__ import annotations

import multiprocessing
import os
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest

from backends.cute import cache
from backends.cute.budget import CuteTactic
from backends.cute.cache import KernelCache

KEY = "sm_100a-x86_64-test"


@pytest.fixture(autouse=True)
def toolchain(monkeypatch) -> None:
    """Keys do not need the DSL installed."""
    monkeypatch.setattr(cache, "_toolchain", lambda _: {"sources": "s", "nvidia-cutlass-dsl": "4.8.1"})


def test_key_names_all_that_matters(monkeypatch) -> None:
    base = cache.kernel_key(CuteTactic(), "bfloat16", "sm_100a", "x86_64")
    others = [
        cache.kernel_key(CuteTactic(), "float16", "sm_100a", "x86_64"),
        cache.kernel_key(CuteTactic(), "bfloat16", "sm_103a", "x86_64"),
        cache.kernel_key(CuteTactic(), "bfloat16", "sm_100a", "aarch64"),
    ]
    for field in fields(CuteTactic):
        if field.name != "split_k":
            value = getattr(CuteTactic(), field.name)
            changed = not value if isinstance(value, bool) else value * 2
            other = replace(CuteTactic(), **{field.name: changed})
            others.append(cache.kernel_key(other, "bfloat16", "sm_100a", "x86_64"))
    for toolchain in ({"sources": "t", "nvidia-cutlass-dsl": "4.8.1"}, {"sources": "s", "nvidia-cutlass-dsl": "4.9.0"}):
        monkeypatch.setattr(cache, "_toolchain", lambda _, toolchain=toolchain: toolchain)
        others.append(cache.kernel_key(CuteTactic(), "bfloat16", "sm_100a", "x86_64"))
    assert len({base, *others}) == 1 + len(others)


def test_division_of_the_work_shares_one_kernel() -> None:
    keys = {cache.kernel_key(CuteTactic(split_k=s), "bfloat16", "sm_100a", "x86_64") for s in (0, 1, 2, 7)}
    assert len(keys) == 1


def test_toolchain_reads_every_source(monkeypatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("cutlass")
    assert set(cache._toolchain(cache._SOURCES)) == {"sources", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base"}
    assert all(path.is_file() for path in cache._SOURCES)


def test_round_trip(tmp_path) -> None:
    kernels = KernelCache(tmp_path / "new" / "cute")
    assert kernels.find(KEY) is None
    made = []
    for _ in range(2):
        path = kernels.find_or_make(KEY, lambda: made.append(1) or b"\x7fELF object")
        assert path == kernels.path(KEY) and path.read_bytes().startswith(b"\x7fELF object")
    assert made == [1]
    assert not list(path.parent.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[: -cache._SEAL_BYTES],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content + b"\0",
        lambda content: b"something else entirely" * 100,
    ],
    ids=["truncated", "empty", "unsealed", "bit flip", "appended", "foreign"],
)
def test_a_damaged_file_is_made_again(tmp_path, damage) -> None:
    kernels = KernelCache(tmp_path)
    path = kernels.find_or_make(KEY, lambda: b"first" * 100)
    path.write_bytes(damage(path.read_bytes()))
    assert kernels.find(KEY) is None
    assert kernels.find_or_make(KEY, lambda: b"second").read_bytes().startswith(b"second")
    assert kernels.find(KEY) == path


def test_a_file_of_another_key_is_not_trusted(tmp_path) -> None:
    kernels = KernelCache(tmp_path)
    os.rename(kernels.find_or_make("other", lambda: b"object"), kernels.path(KEY))
    assert kernels.find(KEY) is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no user ids")
def test_a_file_of_another_user_is_not_trusted(tmp_path, monkeypatch) -> None:
    kernels = KernelCache(tmp_path)
    path = kernels.find_or_make(KEY, lambda: b"object")
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert kernels.find(KEY) is None


def test_a_failed_compilation_leaves_nothing(tmp_path) -> None:
    kernels = KernelCache(tmp_path)

    def fail() -> bytes:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        kernels.find_or_make(KEY, fail)
    assert kernels.find(KEY) is None and not list(tmp_path.glob("*.o"))


def test_an_unusable_directory_costs_a_warning(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="FC2_CACHE_DIR"):
        path = KernelCache(tmp_path / "file" / "cute").find_or_make(KEY, lambda: b"object")
    assert path.read_bytes().startswith(b"object")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def _make(directory: Path, log: Path) -> None:
    def make() -> bytes:
        with open(log, "a") as file:
            file.write("made\n")
        return b"object" * 10_000

    assert KernelCache(directory).find_or_make(KEY, make).read_bytes().startswith(b"object")


def test_processes_make_a_kernel_once(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tmp_path / "cute", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_directory_from_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FC2_CACHE_DIR", str(tmp_path))
    assert cache.default_directory() == tmp_path / "cute"
    monkeypatch.delenv("FC2_CACHE_DIR")
    assert cache.default_directory() == Path.home() / ".cache" / "fc2-dispatch" / "cute"
