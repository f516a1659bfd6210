"""Tables in files: round trips, concurrent writers, damage of every kind, staleness and what this process
remembers."""

from __future__ import annotations

import errno
import functools
import json
import logging
import multiprocessing
import os
import sys
from dataclasses import replace

import pytest

from backends import DeviceInfo, Fc2Problem
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from dispatch import environment, store
from dispatch.choice import choose
from dispatch.evidence import Measured
from dispatch.hardware import GPUS
from dispatch.measured import Entry, Table
from dispatch.model import Family

GPU = "NVIDIA Test 1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """FC2_CACHE_DIR is an empty directory, and nothing was read or reported yet."""
    directory = tmp_path / "cache"
    settings = replace(environment.Settings.of({}), cache_dir=directory)
    monkeypatch.setattr(environment, "settings", lambda: settings)
    monkeypatch.setattr(store, "_reported", set())
    store.forget()
    yield directory
    store.forget()


def entry(m: int, us: float = 10.0, tactic=TorchTactic(), **other) -> Entry:
    notes = {
        "kernel": "k",
        "compiler": "c",
        "timer": "graph",
        "l2": "cold",
        "date": "2026-11-23",
        **other.pop("notes", {}),
    }
    return Entry(Fc2Problem(m, 64, 128, 4), "topk:1", tactic, us * 1e-6, 0.01, notes=notes, **other)


def parse(path) -> Table:
    return Table.parse(path.read_text())


# Tables and their text


def test_table_round_trip_with_everything():
    failed = Entry(
        Fc2Problem(8, 64, 128, 4), "dense", TorchTactic("cached_weight"), None, failure="wrong result"
    )
    model = {"cute": Family(8e-6, 0.75, {"128x64": 0.5})}
    table = Table(
        GPU, (entry(1), entry(2, tactic=CuteTactic(split_k=2)), failed), model=model, extra={"about": "x"}
    )
    assert Table.parse(table.text()) == table


def test_text_is_json_with_one_entry_a_line():
    text = Table(GPU, (entry(1), entry(2))).text()
    record = json.loads(text)
    assert record["schema"] == 1 and record["gpu"] == GPU
    assert [json.loads(line.rstrip(",")) for line in text.splitlines() if '"m"' in line] == record["entries"]
    assert record["entries"][0] == {
        "m": 1, "n": 64, "k": 128, "experts": 4, "out_dtype": "bfloat16", "a_layout": "128x4", "b_layout": "128x4",
        "alpha": "topk:1", "tactic": {"backend": "torch", "form": "experts"}, "us": 10.0, "spread": 0.01,
        "source": "tuned", "kernel": "k", "compiler": "c", "timer": "graph", "l2": "cold", "date": "2026-11-23",
    }  # fmt: skip


def test_fields_of_newer_versions_are_kept():
    record = json.loads(Table(GPU, (entry(1),)).text())
    record["future"] = {"x": [1]}
    record["entries"][0]["humidity"] = 0.4
    table = Table.parse(json.dumps(record))
    assert json.loads(table.merged([entry(2)]).text())["future"] == {"x": [1]}
    assert json.loads(table.text())["entries"][0]["humidity"] == 0.4


def test_tactics_unknown_here_are_kept_but_not_used():
    record = json.loads(Table(GPU, (entry(1), entry(2), entry(3))).text())
    record["entries"][1]["tactic"] = {"backend": "quantum", "qubits": 3}
    record["entries"][2]["tactic"] = {"backend": "cute", "tile_q": 3}
    table = Table.parse(json.dumps(record))
    assert [e.problem.m for e in table.entries] == [1] and not table.set_aside
    assert {r["m"] for r in json.loads(table.text())["entries"]} == {1, 2, 3}
    assert "quantum" in table.unused[0][1] and "tile_q" in table.unused[1][1]


def test_an_entry_replaces_the_one_of_its_key_only():
    table = Table(GPU, (entry(1, 10.0), entry(2, 20.0))).merged([entry(1, 5.0), entry(1, 7.0, source="pr1")])
    assert sorted((e.problem.m, e.source, round(e.seconds * 1e6)) for e in table.entries) == [
        (1, "pr1", 7), (1, "tuned", 5), (2, "tuned", 20),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"m": "1"}, "m is '1'"),
        ({"m": True}, "m is True"),
        ({"m": 0}, "m is 0"),
        ({"us": -1.0}, "us is -1.0"),
        ({"us": "fast"}, "us is 'fast'"),
        ({"us": float("nan")}, "us is nan"),
        ({"us": float("inf")}, "us is inf"),
        ({"us": None}, "us is None"),
        ({"spread": []}, "spread is"),
        ({"tactic": 3}, "tactic is 3"),
        ({"tactic": {"form": "experts"}}, "tactic is"),
        ({"alpha": None}, "alpha is None"),
        ({"alpha": "topk:none"}, "alpha form is 'topk:none'"),
        ({"out_dtype": "int3"}, "out_dtype is 'int3'"),
        ({"out_dtype": []}, "out_dtype is"),
        ({"source": 1}, "source and failure"),
    ],
)
def test_a_damaged_entry_is_set_aside_and_kept(change, reason):
    record = json.loads(Table(GPU, (entry(1), entry(2))).text())
    record["entries"][0] |= change
    table = Table.parse(json.dumps(record))
    assert [e.problem.m for e in table.entries] == [2]
    assert len(table.set_aside) == 1 and table.set_aside[0][1].startswith(reason)
    again = Table.parse(table.text())
    assert [e.problem.m for e in again.entries] == [2]
    assert str(again.set_aside) == str(table.set_aside)  # by text, since NaN differs from itself


def test_entries_that_are_no_objects_and_a_damaged_model_are_set_aside():
    record = json.loads(Table(GPU, (entry(1),)).text())
    record["entries"] += [7, None, "x", []]
    record["model"] = {"cute": {"fixed_us": "soon"}}
    table = Table.parse(json.dumps(record))
    assert len(table.entries) == 1 and len(table.set_aside) == 5 and table.model is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 1, "gpu": "x", "entries": 3}', '{"schema": 0, "gpu": "x", "entries": []}',
     '{"schema": 2, "gpu": "x", "entries": []}', '{"gpu": "x", "entries": []}', "[" * 100000],
)  # fmt: skip
def test_what_is_no_table_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        Table.parse(text)


# Files


def test_save_and_load(cache):
    assert store.save(GPU, [entry(1), entry(2)]) == ""
    assert store.save(GPU, [entry(3)]) == ""
    path = store.user_path(GPU)
    assert path == cache / "NVIDIA-Test-1.json"
    assert [e.problem.m for e in store.load(path).entries] == [1, 2, 3]
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    assert not list(cache.glob("*.tmp"))


def test_an_absent_directory_is_no_table(cache):
    assert store.load(store.user_path(GPU)) is None
    assert not cache.exists(), "reading creates nothing"


def test_names_of_files():
    assert store.file_name("NVIDIA H200") == "NVIDIA-H200.json"
    assert store.file_name("NVIDIA H200 MIG 1g.18gb") == "NVIDIA-H200-MIG-1g.18gb.json"
    assert store.file_name("../../x y/z") == "..-..-x-y-z.json", "no way out of the directory"


@pytest.mark.parametrize("damage", ["truncated", "binary", "empty", "list", "schema"])
def test_a_broken_file_is_reported_once_set_aside_and_replaced(cache, caplog, damage):
    store.save(GPU, [entry(m) for m in range(1, 9)])
    path = store.user_path(GPU)
    text = path.read_text()
    broken = {
        "truncated": text[: len(text) // 2].encode(),
        "binary": b"\x80\x81\xff" * 50,
        "empty": b"",
        "list": b"[1, 2]",
        "schema": text.replace('"schema": 1', '"schema": 0').encode(),
    }[damage]
    path.write_bytes(broken)
    with caplog.at_level(logging.WARNING, "fc2_dispatch"):
        assert store.load(path) is None
        assert store.load(path) is None
    assert len(caplog.records) == 1 and str(path) in caplog.text
    assert store.save(GPU, [entry(20)]) == ""
    assert [e.problem.m for e in store.load(path).entries] == [20]
    assert (cache / f"{path.name}.broken-0").read_bytes() == broken, "nothing is thrown away"


def test_damaged_entries_of_a_file_are_reported_once(cache, caplog):
    store.save(GPU, [entry(1), entry(2)])
    path = store.user_path(GPU)
    path.write_text(path.read_text().replace('"us": 10.0', '"us": "x"', 1))
    with caplog.at_level(logging.WARNING, "fc2_dispatch"):
        for _ in range(2):
            assert [e.problem.m for e in store.load(path).entries] == [2]
    assert caplog.text.count("1 damaged entries are not used; the first: us is 'x'") == 1


def write_twenty(directory, writer: int, begin) -> None:
    begin.wait()
    for i in range(20):
        e = Entry(Fc2Problem(1 + i, 16 * (1 + writer), 128, 4), "topk:1", TorchTactic(), 1e-5)
        assert store.save(GPU, [e], directory) == ""
        assert store.load(store.user_path(GPU, directory)) is not None


def test_eight_writers_lose_nothing(cache):
    context = multiprocessing.get_context(
        "fork"
    )  # a fresh interpreter each would spend most of its time importing
    begin = context.Barrier(8)
    writers = [context.Process(target=write_twenty, args=(cache, i, begin)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0] * 8
    table = store.load(store.user_path(GPU))
    assert {(e.problem.n, e.problem.m) for e in table.entries} == {
        (16 * w, m) for w in range(1, 9) for m in range(1, 21)
    }
    assert not list(cache.glob("*.tmp")) and not list(cache.glob("*.broken*"))


def test_a_full_disk_leaves_the_file_as_it_was(cache, monkeypatch, caplog):
    store.save(GPU, [entry(1)])
    before = store.user_path(GPU).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING, "fc2_dispatch"):
        assert "No space left" in store.save(GPU, [entry(2)])
        assert "No space left" in store.save(GPU, [entry(3)])
    assert caplog.text.count("kept for this process only") == 1
    assert store.user_path(GPU).read_bytes() == before
    assert not list(cache.glob("*.tmp"))


def test_a_directory_that_cannot_be_written_is_fine(cache, caplog):
    cache.parent.joinpath("file").write_text("")
    directory = cache.parent / "file" / "below"  # as root too, unlike one without write permission
    with caplog.at_level(logging.WARNING, "fc2_dispatch"):
        assert store.save(GPU, [entry(1)], directory) != ""
    assert "kept for this process only" in caplog.text
    assert store.load(store.user_path(GPU, directory)) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only directories")
def test_a_read_only_directory_is_read(cache):
    store.save(GPU, [entry(1)])
    cache.chmod(0o555)
    try:
        assert store.save(GPU, [entry(2)]) != ""
        assert len(store.load(store.user_path(GPU)).entries) == 1
    finally:
        cache.chmod(0o755)


# What a process makes of them


def test_tuned_entries_of_other_kernels_are_not_used(cache, caplog):
    device = DeviceInfo("cuda", GPU, (8, 0), 100)
    now = environment.conditions(store.registry.get("torch"))
    current = entry(1, notes=now)
    old_kernel = entry(2, notes={**now, "kernel": "0123"})
    old_compiler = entry(4, notes={**now, "compiler": "torch 1.0"})
    store.save(GPU, [current, old_kernel, old_compiler])
    with caplog.at_level(logging.WARNING, "fc2_dispatch"):
        known = store.measured_for(device)
    assert [e.problem.m for e in known.user.entries] == [1]
    assert "2 entries were measured with other kernels or compilers" in caplog.text
    assert len(store.load(store.user_path(GPU)).entries) == 3, "they stay in the file"


def test_what_was_tuned_counts_at_once_even_if_it_could_not_be_saved(cache):
    cpu = DeviceInfo("cpu", "cpu")
    problem = Fc2Problem(1, 64, 128, 4, device_type="cpu")
    assert choose(problem, cpu, store.measured_for(cpu)).source == "default"
    store.remember(cpu, [entry(1)])
    decision = choose(problem, cpu, store.measured_for(cpu))
    assert (decision.source, decision.seconds) == ("measured", pytest.approx(10e-6))
    store.forget()
    assert choose(problem, cpu, store.measured_for(cpu)).source == "default"


def test_a_gpu_without_a_table_takes_its_nearest_relative():
    b200 = store.shipped_for(DeviceInfo("cuda", "NVIDIA B200", (10, 0), 148))
    assert b200.gpu == "NVIDIA B200"
    for name, capability in (("NVIDIA GB200", (10, 0)), ("NVIDIA B300", (10, 3))):
        device = DeviceInfo("cuda", name, capability, 148)
        assert store.shipped_for(device) is b200
        known = store.measured_for(device)
        assert known.foreign == "NVIDIA B200" and known.model is not None
        assert known.shipped.entries == b200.entries, "their ceilings are not known"
    assert store.shipped_for(DeviceInfo("cuda", "Tesla V100", (7, 0))) is None
    assert store.shipped_for(DeviceInfo("cpu", "cpu")) is None


@pytest.mark.parametrize(
    "m, alpha, ratio",
    [
        (8, "topk:8", 4.38 / 2.98),  # reading the weights
        (512, "topk:8", 4.38 / 2.98),  # the same: few rows of each expert
        (512, "dense", 790 / 780),  # multiplying
        (512, "any", 790 / 780),
    ],
)
def test_times_of_another_gpu_are_carried_over_by_the_floors(m, alpha, ratio):
    device = GPUS["H100"].device
    timed = Entry(Fc2Problem(m, 7168, 65536, 256), alpha, TorchTactic(), 100e-6)
    failed = replace(timed, tactic=TorchTactic("cached_weight"), seconds=None, failure="crashed")
    carried = store.carried_over(Table("NVIDIA H200", (timed, failed)), device)
    assert carried.entries[0].seconds == pytest.approx(100e-6 * ratio)
    assert carried.entries[1] == failed
    unknown = Table("Voodoo 2", (timed,))
    assert store.carried_over(unknown, device) is unknown


def test_an_h100_without_a_table_would_be_decided_by_the_h200s_times(cache, monkeypatch):
    device, h200 = GPUS["H100"].device, GPUS["H200"].device
    assert store.shipped_for(device).gpu == device.name
    others = {name: table for name, table in store.shipped_tables().items() if name != device.name}
    monkeypatch.setattr(store, "shipped_tables", functools.lru_cache(lambda: others))
    problem = Fc2Problem(64, 7168, 65536, 256, b_layout="triton/fragments", capability=(9, 0))
    decision = choose(problem, device, store.measured_for(device), "triton")
    assert decision.source == "model"
    assert decision.tactic == choose(problem, h200, store.measured_for(h200), "triton").tactic
    assert "carried over from NVIDIA H200" in str(decision)


def test_shipped_tables_are_whole():
    paths = sorted(store.SHIPPED.glob("*.json"))
    assert store.SHIPPED / "NVIDIA-B200.json" in paths
    for path in paths:
        table = parse(path)
        assert table.entries and table.model and not table.set_aside and not table.unused, path
        assert path.name == store.file_name(table.gpu)
        assert Table.parse(table.text()) == table
        for e in table.entries:
            assert e.notes["l2"] == "cold", e
    published = parse(store.SHIPPED / "NVIDIA-B200.json")
    assert len([e for e in published.entries if e.source in ("pr12686", "pr13833")]) == 26
    assert set(published.extra["sources"]) == {"pr12686", "pr13833"}


def test_the_fingerprint_follows_code_and_not_comments(tmp_path, monkeypatch):
    def fingerprint(source: str) -> str:
        path = tmp_path / "their_kernel.py"
        path.write_text(source)
        module = type(sys)("their_kernel")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "their_kernel", module)
        environment.kernel_fingerprint.cache_clear()
        return environment.kernel_fingerprint(type("Theirs", (), {"__module__": "their_kernel"}))

    plain = fingerprint('def f(x):\n    """Doc."""\n    return x + 1\n')
    assert plain == fingerprint('"""Module."""\n# why\ndef f(x):\n    """Other."""\n    return (x   + 1)\n')
    assert plain != fingerprint('def f(x):\n    """Doc."""\n    return x + 2\n')


def test_measured_ignores_failures_as_times():
    failed = Entry(Fc2Problem(1, 64, 128, 4), "topk:1", TorchTactic(), None, failure="crashed")
    known = Measured(Table(GPU, (failed,))).evidence(Fc2Problem(1, 64, 128, 4))
    assert known.estimates == {} and known.failures == {TorchTactic(): "crashed"}
