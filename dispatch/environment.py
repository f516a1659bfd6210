"""Environment variables, read once, and what the machine has: versions, kernels' fingerprints, the GPU."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import torch

from backends.interface import Fc2Backend
from dispatch.errors import ArgumentError

log = logging.getLogger("fc2_dispatch")

#: The package whose compiler makes each built-in backend's kernels.
COMPILERS = {
    "cute": "nvidia-cutlass-dsl",
    "hopper": "nvidia-cutlass-dsl",
    "triton": "triton",
    "torch": "torch",
}


@dataclass(frozen=True)
class Settings:
    """The environment variables of this package.

    Attributes:
        backend: FC2_BACKEND, for calls with backend="auto" and no tactic; "auto" if unset.
        tactic: FC2_TACTIC, for the same calls, as `choice.Pin.parse` takes it; "" if unset.
        cache_dir: FC2_CACHE_DIR, where tuned tables are kept; default ~/.cache/fc2-dispatch.
        log: FC2_LOG is 1: each new decision is logged once.
    """

    backend: str
    tactic: str
    cache_dir: Path
    log: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Raises ArgumentError for a value of FC2_LOG other than 0 and 1."""
        log = environment.get("FC2_LOG", "") or "0"
        if log not in ("0", "1"):
            raise ArgumentError(f"FC2_LOG is {log!r}; it takes 0 or 1")
        directory = environment.get("FC2_CACHE_DIR") or os.path.join("~", ".cache", "fc2-dispatch")
        return cls(
            backend=environment.get("FC2_BACKEND") or "auto",
            tactic=environment.get("FC2_TACTIC") or "",
            cache_dir=Path(directory).expanduser(),
            log=log == "1",
        )


@functools.lru_cache(maxsize=None)
def settings() -> Settings:
    """The process's settings: read at the first call, then fixed. FC2_LOG=1 then also logs to stderr."""
    wanted = Settings.of(os.environ)
    if wanted.log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return wanted


def version(package: str) -> str:
    """Installed version; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compiler(backend: str) -> str:
    """Name and version of what compiles a backend's kernels, such as "triton 3.6.0"; "" where unknown."""
    package = COMPILERS.get(backend)
    # A local version label (torch 2.11.0+cu130) names the build, not the release.
    return f"{package} {version(package).partition('+')[0]}" if package else ""


@functools.lru_cache(maxsize=None)
def kernel_fingerprint(backend: type[Fc2Backend]) -> str:
    """12 hex digits of the source of a backend: its package under `backends`, or its own module.

    Comments, docstrings and formatting do not count, nor does the version of Python, so that only changes of the
    code make measurements stale.
    """
    module = sys.modules[backend.__module__]
    path = Path(module.__file__)
    package = backend.__module__.rpartition(".")[0]
    files = sorted(path.parent.glob("*.py")) if package.startswith("backends.") else [path]
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                    node.body = body[1:] or [ast.Pass()]
        digest.update(f"{file.name}\n{_plain(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _plain(node: object) -> str:
    """A syntax tree as text, equal for all versions of Python: fields that one of them lacks are empty in the others."""
    if isinstance(node, list):
        return f"[{' '.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{name}={_plain(value)}" for name, value in ast.iter_fields(node) if value is not None and value != [])
    return f"{type(node).__name__}({' '.join(fields)})"


def conditions(backend: Fc2Backend) -> dict[str, str]:
    """What must be the same for a tuned time of this backend to hold."""
    return {"kernel": kernel_fingerprint(type(backend)), "compiler": compiler(backend.name)}


def describe() -> dict[str, Any]:
    """The software and the GPUs of this machine, for reports."""
    packages = {
        name: version(name) or "not installed" for name in ("torch", "triton", "nvidia-cutlass-dsl", "numpy")
    }
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus.append(
                f"{p.name}, SM {p.major}.{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 1e9:.0f} GB, "
                f"L2 {p.L2_cache_size / 1e6:.0f} MB"
            )
    return {
        "python": platform.python_version(),
        **packages,
        "cuda of torch": torch.version.cuda or "none",
        "driver": _driver(),
        "gpus": gpus,
    }


def _driver() -> str:
    """Version of the NVIDIA driver, from its own file; "none" where there is none or it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none"
    words = text.partition("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
