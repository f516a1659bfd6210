"""`python -m dispatch`: what it prints, without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from backends import DeviceInfo, Fc2Problem, Support
from backends.cute.backend import CuteBackend
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from dispatch import environment, store
from dispatch.__main__ import main
from dispatch.measured import Entry, Table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    settings = replace(environment.Settings.of({}), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(environment, "settings", lambda: settings)
    monkeypatch.setattr(
        CuteBackend, "is_supported", lambda self, device: Support(device.capability == (10, 0), "needs SM 10")
    )
    store.forget()
    yield tmp_path / "cache"
    store.forget()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_environment(capsys, cache):
    store.save("NVIDIA H200", [Entry(Fc2Problem(1, 64, 128, 4), "topk:1", TorchTactic(), 1e-5)])
    status, out, _ = run(capsys)
    assert status == 0
    for text in ("python: 3.", "torch: ", "triton: ", "driver: ", "gpus: ", "cute: no: needs SM 10", "torch: yes",
                 "NVIDIA B200: 26 times of 1 shapes (pr12686, pr13833); model fitted", f"cache: {cache}",
                 "NVIDIA-H200.json: NVIDIA H200: 1 times of 1 shapes (tuned); 1 stale", "FC2_LOG=0"):  # fmt: skip
        assert text in out, text


def test_explain_for_a_gpu_that_is_not_here(capsys):
    status, out, _ = run(capsys, *"explain --m 128 --n 7168 --k 65536 --experts 256 --device B200".split())
    assert status == 0
    assert f"{CuteTactic(256, 128, 256, 2, 1)} (rule, 70.2 us predicted)" in out
    assert "53.9 us published (pr13833): 23% less, but the rule holds" in out


def test_explain_by_shape_name_and_with_overrides(capsys):
    status, out, _ = run(
        capsys, *"explain --m 64 --shape deepseek-v3-tp8,qwen3-235b-tp4 --device B200".split()
    )
    assert status == 0 and out.count("fc2 m=64") == 2
    status, out, _ = run(
        capsys,
        "explain",
        "--m",
        "64",
        "--shape",
        "deepseek-v3-tp8",
        "--device",
        "B200",
        "--tactic",
        "cute(tile_n=64)",
    )
    assert "tile_n=64" in out.splitlines()[1] and "published (pr13833)" in out


def test_explain_several_token_counts(capsys):
    status, out, _ = run(capsys, *"explain --m 1,64:128:64 --shape deepseek-v3-tp8 --device B200".split())
    assert status == 0 and re.findall(r"fc2 m=(\d+)", out) == ["1", "64", "128"]
    with pytest.raises(SystemExit):
        main("explain --m 0 --n 64 --k 128 --experts 4".split())
    assert "'0' is not a positive number" in capsys.readouterr().err


def test_explain_takes_the_weights_as_prepared(capsys):
    line = "explain --m 64 --shape deepseek-v3-tp8 --device"
    for arguments, layout in (
        ("H200", "triton/fragments"),
        ("H200 --b-layout 128x4", "128x4"),
        ("H200 --backend torch", "128x4"),
        ("H200 --tactic torch", "128x4"),
        ("B200", "128x4"),  # its first backend reads plain weights
        ("B200 --backend triton", "triton/fragments"),
    ):
        status, out, _ = run(capsys, *line.split(), *arguments.split())
        assert status == 0 and f"b={layout} on" in out, arguments


@pytest.mark.parametrize(
    "line, text",
    [
        ("explain --m 4", "name the sizes: either --shape, or all of --n, --k and --experts"),
        ("explain --m 4 --n 64", "name the sizes"),
        ("explain --m 4 --shape nothing", "--shape 'nothing' is unknown; known: deepseek-v3-tp8"),
        ("explain --m 4 --n 64 --k 100 --experts 4", "k / experts must be a positive multiple of 16"),
        (
            "explain --m 4 --n 64 --k 128 --experts 4 --device X1",
            "--device 'X1' is unknown; known: B200, H200",
        ),
        ("explain --m 4 --n 64 --k 128 --experts 4 --backend x", "backend is 'x'; known: auto"),
        ("explain --m 4 --n 64 --k 128 --experts 4 --device H200 --backend cute", "needs SM 10"),
        ("explain --m 4 --n 64 --k 128 --experts 4 --tactic ???", "tactic is '???'"),
        ("fit /nonexistent/table.json", "No such file"),
        (f"fit {__file__}", "test_cli.py: Extra data"),
    ],
)
def test_errors_are_sentences_with_status_2(capsys, line, text):
    status, out, err = run(capsys, *line.split())
    assert status == 2 and out == "" and text in err and err.startswith("error: ")


def test_tune_then_explain(capsys, cache):
    status, out, err = run(
        capsys, *"tune --n 64 --k 128 --experts 4 --m 1,4 --budget 60 --backends torch --no-refine".split()
    )
    assert status == 0, err
    assert "tuned 2 problems" in out and f"saved to {cache}" in out
    record = json.loads((cache / "cpu.json").read_text())
    assert {e["m"] for e in record["entries"]} == {1, 4}
    status, out, _ = run(capsys, *"explain --m 4 --n 64 --k 128 --experts 4".split())
    assert "torch(form=experts) (measured," in out and "measured by tuning" in out
    status, out, _ = run(capsys, *"explain --m 2 --n 64 --k 128 --experts 4".split())
    assert "(interpolated," in out


def test_fit_and_ship(capsys, cache, tmp_path, monkeypatch):
    shipped = tmp_path / "tables"
    shipped.mkdir()
    monkeypatch.setattr(store, "SHIPPED", shipped)
    problems = [Fc2Problem(m, 7168, 65536, 256) for m in (1, 8, 64)]
    rows = [
        Entry(p, "topk:8", TorchTactic(), (100 + p.m) * 1e-5, notes={"timer": "graph", "l2": "cold"})
        for p in problems
    ]
    path = tmp_path / "mine.json"
    store.write(path, Table("NVIDIA H200", tuple(rows)))
    status, out, _ = run(capsys, "ship", str(path))
    assert status == 0 and "leave-one-out prediction error over 3 of 3 rows" in out
    table = store.load(shipped / "NVIDIA-H200.json")
    assert len(table.entries) == 3 and "torch/experts" in table.model
    status, out, _ = run(capsys, "fit", str(path))
    assert status == 0 and "torch/experts: {'fixed_us'" in out
    assert store.load(path).model == table.model
    h200 = DeviceInfo("cuda", "NVIDIA H200", (9, 0), 132)
    assert store.measured_for(h200).shipped is not None


def test_it_runs_as_a_module():
    command = [
        sys.executable,
        "-m",
        "dispatch",
        "explain",
        "--m",
        "3",
        "--n",
        "64",
        "--k",
        "128",
        "--experts",
        "4",
    ]
    run_ = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "FC2_CACHE_DIR": "/nonexistent"}
    )
    assert run_.returncode == 0 and "torch(form=experts) (default)" in run_.stdout, run_.stderr
