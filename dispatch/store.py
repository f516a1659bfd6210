"""Tables in files: those that ship with the package, and the user's own under FC2_CACHE_DIR.

A user's file is one JSON per GPU model. Writers take a lock, read what is there, add their entries and
replace the file atomically, so that processes sharing a directory lose nothing. What cannot be read is set
aside and reported once.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Iterable, Optional

from backends import registry
from backends.device import DeviceInfo
from dispatch import environment
from dispatch.environment import log
from dispatch.evidence import Measured
from dispatch.hardware import GPUS, Gpu, floor_seconds, gpu_named
from dispatch.measured import Entry, Table
from dispatch.model import Model, active_share, top_k_of

#: Tables that ship with the package.
SHIPPED = Path(__file__).parent / "tables"
# A writer holds the lock for milliseconds; waiting longer means that its holder hangs.
_LOCK_SECONDS = 30.0

_reported: set[str] = set()
_lock = threading.Lock()


def file_name(gpu: str) -> str:
    """`NVIDIA H200` -> `NVIDIA-H200.json`."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") + ".json"


def user_path(gpu: str, directory: Optional[Path] = None) -> Path:
    """Where the user's table of a GPU model is."""
    return (directory or environment.settings().cache_dir) / file_name(gpu)


def load(path: Path) -> Optional[Table]:
    """The table in a file; None if there is none or it cannot be read, which is reported once per process."""
    try:
        table = Table.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _report(f"{path}: not used: {error}")
        return None
    if table.set_aside:
        _report(
            f"{path}: {len(table.set_aside)} damaged entries are not used; the first: {table.set_aside[0][1]}"
        )
    return table


def save(gpu: str, entries: Iterable[Entry], directory: Optional[Path] = None) -> str:
    """Add entries to the user's table of a GPU model.

    Returns:
        "" when the file holds them, else why it does not (a read-only directory, a full disk): reported once,
        and the file is as it was before.
    """
    from filelock import FileLock, Timeout

    path = user_path(gpu, directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            write(path, _existing(path, gpu).merged(entries))
    except (OSError, Timeout) as error:
        _report(f"{path}: tuned times are kept for this process only: {error}")
        return str(error)
    return ""


def write(path: Path, table: Table) -> None:
    """Replace a table's file atomically. Raises OSError, leaving the file as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(table.text())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _existing(path: Path, gpu: str) -> Table:
    """The table to add to. A file that is not one is renamed, never overwritten."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Table(gpu)
    except UnicodeDecodeError:
        text = ""
    try:
        return Table.parse(text)
    except (ValueError, RecursionError):
        count = len(list(path.parent.glob(f"{path.name}.broken-*")))
        os.replace(path, f"{path}.broken-{count}")
        return Table(gpu)


@functools.lru_cache(maxsize=None)
def shipped_tables() -> dict[str, Table]:
    """The package's tables by GPU name."""
    tables = (load(path) for path in sorted(SHIPPED.glob("*.json")))
    return {table.gpu: table for table in tables if table is not None}


def shipped_for(device: DeviceInfo) -> Optional[Table]:
    """The shipped table of this GPU, else of one of the same compute capability, else of the same major
    one."""
    tables = shipped_tables()
    if device.type != "cuda" or device.capability is None:
        return None
    if device.name in tables:
        return tables[device.name]
    known = {gpu.device.name: gpu.device.capability for gpu in GPUS.values()}
    for digits in (2, 1):
        for name, table in tables.items():
            if known.get(name, (0, 0))[:digits] == device.capability[:digits]:
                return table
    return None


def fresh(table: Table) -> tuple[Table, int]:
    """The table without the tuned entries of other kernels or compilers, and how many those are."""
    wanted = {
        name: environment.conditions(registry.get(name)) for name in {e.tactic.backend for e in table.entries}
    }
    kept = tuple(
        e for e in table.entries if all(e.notes.get(k) == v for k, v in wanted[e.tactic.backend].items())
    )
    return replace(table, entries=kept), len(table.entries) - len(kept)


def model_for(device: DeviceInfo, table: Optional[Table]) -> Optional[Model]:
    """The table's model with the device's own ceilings; those of the table's GPU where the device's are
    unknown."""
    if table is None or table.model is None:
        return None
    gpu = gpu_named(device.name) or gpu_named(table.gpu)
    if gpu is None:
        return None
    return Model(device.sm_count or gpu.device.sm_count, gpu.read_bandwidth, gpu.mma_flops, table.model)


def carried_over(table: Table, device: DeviceInfo) -> Table:
    """Another GPU's table as this one's times should be: each in proportion to its problem's floors on the two.

    The order of a problem's tactics stays as measured. Times stay as they are where either GPU's ceilings are unknown.
    """
    here, there = gpu_named(device.name), gpu_named(table.gpu)
    if here is None or there is None:
        return table

    def floor(entry: Entry, gpu: Gpu) -> float:
        p = entry.problem
        rows = p.m * top_k_of(entry.alpha, p.experts)
        return floor_seconds(p, gpu, active_share(p, entry.alpha) * p.experts, rows)

    def moved(entry: Entry) -> Entry:
        ratio = floor(entry, here) / floor(entry, there)
        return entry if entry.seconds is None else replace(entry, seconds=entry.seconds * ratio)

    return replace(table, entries=tuple(map(moved, table.entries)))


_measured: dict[str, Measured] = {}


def measured_for(device: DeviceInfo) -> Measured:
    """What is known of a device; files are read at the first call for a GPU model, and after `forget`."""
    known = _measured.get(device.name)
    if known is None:
        with _lock:
            known = _measured.get(device.name) or _read(device)
            _measured[device.name] = known
    return known


def _read(device: DeviceInfo) -> Measured:
    shipped = shipped_for(device)
    user = load(user_path(device.name))
    if user is not None:
        user, stale = fresh(user)
        if stale:
            _report(
                f"{user_path(device.name)}: {stale} entries were measured with other kernels or compilers and are not "
                "used; run `python -m dispatch tune` to measure again"
            )
    model, foreign = model_for(device, shipped), ""
    if shipped is not None and shipped.gpu != device.name:
        shipped, foreign = carried_over(shipped, device), shipped.gpu
    return Measured(shipped, user, model, foreign)


def remember(device: DeviceInfo, entries: Iterable[Entry]) -> None:
    """Let this process use new entries at once, whether or not they could be saved."""
    with _lock:
        known = _measured.get(device.name) or _read(device)
        user = (known.user or Table(device.name)).merged(entries)
        _measured[device.name] = Measured(known.shipped, user, known.model, known.foreign)


def forget() -> None:
    """Drop what was read, so that files are read again."""
    with _lock:
        _measured.clear()
        shipped_tables.cache_clear()


def _report(message: str) -> None:
    if message not in _reported:
        _reported.add(message)
        log.warning("%s", message)
