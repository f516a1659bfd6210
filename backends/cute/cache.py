"""Compiled kernels on disk, shared by processes: `<directory>/<name>-<key>.o`.

A file is an ELF object followed by a seal, the SHA-256 of its key and its bytes. A file whose seal does not fit, or
that belongs to another user, is treated as absent. Files appear by atomic rename, and a lock per file keeps processes
that want the same kernel from all compiling it. Nothing here knows the DSL.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Callable, Iterator

from filelock import FileLock

from backends.cute.budget import CuteTactic

_MAGIC = b"fc2-cute"
_SEAL_BYTES = len(_MAGIC) + 32
_SOURCES = tuple(Path(__file__).parent / name for name in ("kernel.py", "budget.py", "compiler.py", "launcher.py"))
#: Distributions whose version decides what is compiled.
_COMPILERS = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base")


def default_directory() -> Path:
    """$FC2_CACHE_DIR, or ~/.cache/fc2-dispatch; compiled kernels lie in its subdirectory "cute"."""
    root = os.environ.get("FC2_CACHE_DIR") or Path.home() / ".cache" / "fc2-dispatch"
    return Path(root) / "cute"


@functools.lru_cache(maxsize=None)
def _toolchain(sources: tuple[Path, ...]) -> dict[str, str]:
    content = hashlib.sha256()
    for path in sources:
        content.update(path.read_bytes())
    return {"sources": content.hexdigest(), **{name: metadata.version(name) for name in _COMPILERS}}


def object_key(stem: str, fields: dict[str, object], sources: tuple[Path, ...]) -> str:
    """A file name's stem: readable, and a hash of all that decides the object's bytes.

    Args:
        fields: of the kernel's configuration and target.
        sources: every file whose text decides what is compiled.
    """
    text = json.dumps(fields | _toolchain(sources), sort_keys=True)
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def kernel_key(tactic: CuteTactic, out_dtype: str, arch: str, machine: str = platform.machine()) -> str:
    """The `object_key` of an SM100 kernel. split_k is a run-time argument of it and is left out."""
    fields = {k: v for k, v in tactic.to_json().items() if k != "split_k"}
    fields |= {"out_dtype": out_dtype, "arch": arch, "machine": machine}
    return object_key(f"{arch}-{machine}-{describe(tactic)}-{out_dtype}", fields, _SOURCES)


def describe(tactic: CuteTactic) -> str:
    """Short name of the kernel a tactic runs, such as "256x128x256@2x1"."""
    name = f"{tactic.tile_m}x{tactic.tile_n}x{tactic.tile_k}@{tactic.cluster_m}x{tactic.cluster_n}"
    return name + ("-skip" if tactic.skip else "") + ("-pdl" if tactic.pdl else "")


class KernelCache:
    """The object files of one directory, created on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.o"

    def find(self, key: str) -> Path | None:
        """The sealed file of that key; None where there is none, or none that can be trusted."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                # Code from a stranger's file would run in this process.
                if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid not in (0, os.getuid()):
                    return None
                content = file.read()
        except OSError:
            return None
        return path if content[-_SEAL_BYTES:] == _seal(key, content[:-_SEAL_BYTES]) else None

    def find_or_make(self, key: str, make: Callable[[], bytes]) -> Path:
        """The sealed file of that key, made by `make()` where absent; one process makes it, others wait for it.

        A directory that cannot be written to costs a warning and a temporary file.
        """
        path = self.find(key)
        if path is not None:
            return path
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                # Another process may have made it while this one waited.
                return self.find(key) or self._write(key, make())
        except OSError as error:
            warnings.warn(f"compiled kernels are not kept: {error}; set FC2_CACHE_DIR to a writable directory")
            return KernelCache(Path(_temporary_directory()))._write(key, make())

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with FileLock(self.directory / f"{key}.lock"):
            yield

    def _write(self, key: str, content: bytes) -> Path:
        descriptor, name = tempfile.mkstemp(dir=self.directory, prefix=f".{key}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content + _seal(key, content))
            os.replace(name, self.path(key))
        except BaseException:
            os.unlink(name)
            raise
        return self.path(key)


@functools.lru_cache(maxsize=None)
def _temporary_directory() -> str:
    return tempfile.mkdtemp(prefix="fc2-cute-")


def _seal(key: str, content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + b"\0" + content).digest()
