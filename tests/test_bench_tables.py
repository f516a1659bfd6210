"""What becomes of results beyond the terminal: the shipped table, the B200 procedure, the model, the report page."""
from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from backends import DeviceInfo, Fc2Problem
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from bench import b200, laptop, modelled, shootout
from bench.__main__ import main
from bench.clocks import Clocks
from bench.peers import DISPLACED, best_published, measured_peers, published
from bench.records import Results, read_results, write_json
from dispatch.choice import choose
from dispatch.hardware import GPUS
from dispatch.evidence import Measured
from dispatch.store import load, shipped_tables
from tests.bench_samples import ENVIRONMENT, row, shoot_out

B200 = GPUS["B200"].device


def _cute_row(m=256, us=60.0, *, tile=(256, 128), cluster=(2, 1), **changes):
    tactic = CuteTactic(tile_m=tile[0], tile_n=tile[1], cluster_m=cluster[0], cluster_n=cluster[1])
    fields = {name: value for name, value in tactic.to_json().items() if name != "backend"}
    return row(m, us, "cute", fields=fields, timer="cupti", **changes)


def _b200_file(path, rows):
    environment = {
        **ENVIRONMENT,
        "device": "NVIDIA B200",
        "conditions": {"cute": {"kernel": "abc", "compiler": "4.8"}},
    }
    with open(path, "w") as stream:
        write_json(Results(environment, list(rows)), stream)
    return str(path)


# --- published numbers and peers


def test_published_numbers_are_those_of_the_table():
    best = best_published(7168, 65536, 256)
    assert {m: round(best[m], 2) for m in (32, 128, 256, 384)} == {32: 52.09, 128: 53.89, 256: 72.43, 384: 135.64}
    assert {p.gpu for p in published(7168, 65536, 256)} == {"NVIDIA B200"}
    assert published(4096, 65536, 256) == []


def test_peers_are_of_one_gpu_shape_and_alpha():
    routed = measured_peers("NVIDIA H200", 7168, 65536, 256, "topk:8")
    assert {p.us[8] for p in routed} == {32.2, 42.1}
    assert len(measured_peers("NVIDIA H200", 7168, 65536, 256, "dense")) == 3
    assert measured_peers("NVIDIA H100 PCIe", 7168, 65536, 256, "dense") == []


# --- bench import


def test_import_makes_the_measured_table(tmp_path, capsys):
    shipped = shipped_tables()["NVIDIA B200"]
    (tmp_path / "NVIDIA-B200.json").write_text(shipped.text())
    wrong = _cute_row(us=10.0, tile=(128, 64), cluster=(1, 1), error_over_bar=7.0)
    rows = [_cute_row(), _cute_row(us=40.0, tile=(128, 128), cluster=(1, 2)), wrong]
    hot = _cute_row(m=384, clocks=Clocks((1200, 1900), 80, ("hardware slowdown",)))
    warm = _cute_row(m=128, l2="warm")
    baseline = row(256, 300.0, fields={"form": "cached_weight"}, error_over_bar=50.0)
    file = _b200_file(tmp_path / "sent.json", [*rows, hot, warm, baseline])
    assert main(["import", file, "--into", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 times and 1 failures added" in printed
    assert "throttled" in printed and "L2 was warm" in printed and "as it is known to" in printed

    table = load(tmp_path / "NVIDIA-B200.json")
    assert [e.source for e in table.entries] == ["shoot-out"] * 3
    assert len(table.extra[DISPLACED]) == len(shipped.entries)
    timed, failed = [e for e in table.entries if e.seconds], [e for e in table.entries if not e.seconds]
    assert {round(e.seconds * 1e6, 3) for e in timed} == {60.0, 40.0}
    assert failed[0].failure == "wrong result: 7 times the accuracy bar" and failed[0].tactic.tile_n == 64
    assert timed[0].notes["kernel"] == "abc" and timed[0].notes["timer"] == "cupti"
    # Importing again replaces and keeps the published rows.
    assert main(["import", file, "--into", str(tmp_path)]) == 0
    again = load(tmp_path / "NVIDIA-B200.json")
    assert len(again.entries) == 3 and len(again.extra[DISPLACED]) == len(shipped.entries)


def test_import_of_a_gpu_without_ceilings_and_of_nothing(tmp_path, capsys):
    path = tmp_path / "other.json"
    with open(path, "w") as stream:
        write_json(
            Results({**ENVIRONMENT, "device": "NVIDIA L4"}, [row(8, 50.0, fields={"form": "experts"})]), stream
        )
    assert main(["import", str(path), "--into", str(tmp_path)]) == 0
    assert "no model was fitted" in capsys.readouterr().out
    assert len(load(tmp_path / "NVIDIA-L4.json").entries) == 1
    nothing = _b200_file(tmp_path / "nothing.json", [_cute_row(l2="warm")])
    assert main(["import", nothing, "--into", str(tmp_path)]) == 2
    assert main(["import", str(tmp_path / "absent.json")]) == 2
    with pytest.raises(SystemExit):
        main(["import", str(path), "--into", str(tmp_path / "absent")])


# --- bench b200


def test_b200_refuses_other_devices(capsys):
    assert main(["b200", "--device", "cpu"]) == 2
    assert "needs an SM 10.0 or 10.3 GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # before an hour of checks, not after it
        main(["b200", "--rehearse", "--device", "cpu", "--out", "/nonexistent/b200.json"])


def test_the_check_finds_what_is_wrong_and_keeps_what_is_right():
    problems = [
        (Fc2Problem(m, 128, 512, 4, device_type="cpu"), alpha) for m in (1, 9) for alpha in ("topk:2", "dense")
    ]
    shares = []
    tactics = [TorchTactic(), TorchTactic("cached_weight")]
    found = b200.check_tactics(problems, tactics, "cpu", 60.0, lambda text, share: shares.append(share))
    failures = dict(found)
    assert list(failures) == [TorchTactic("cached_weight")]
    assert re.fullmatch(
        r"M=1 topk:2: wrong result: .* times the accuracy bar", failures[TorchTactic("cached_weight")]
    )
    assert len(shares) == 8 and shares == sorted(shares)


def test_a_hanging_or_dying_tactic_costs_only_itself(monkeypatch):
    class Worker:
        """Dies at one tactic, hangs at another, and needs a set-up before it answers."""

        started = 0

        def __init__(self):
            Worker.started += 1
            self.ready = False

        def ask(self, request, seconds):
            if request["do"] == "setup":
                self.ready = True
                yield {"ok": True}
                return
            assert self.ready
            if request["tactic"]["tile_n"] == 64:
                raise b200.WorkerDied("killed by SIGSEGV")
            if request["tactic"]["split_k"] == 2:
                raise b200.WorkerDied(f"no answer within {seconds:.0f} s")
            yield {"ok": True}

        def close(self):
            self.ready = False

    monkeypatch.setattr(b200, "WorkerProcess", Worker)
    tactics = [CuteTactic(), CuteTactic(tile_n=64), CuteTactic(split_k=2), CuteTactic(tile_k=128)]
    problems = [(Fc2Problem(m, 7168, 65536, 256, capability=(10, 0)), "dense") for m in (8, 128)]
    failures = dict(b200.check_tactics(problems, tactics, "cuda", 30.0, lambda text, share: None))
    assert failures == {tactics[1]: "M=8 dense: killed by SIGSEGV", tactics[2]: "M=8 dense: no answer within 30 s"}
    assert Worker.started == 3


def test_a_rehearsal_writes_the_file_to_send(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = "--rehearse --device cpu --backends torch --n 128 --k 512 --experts 4 --alpha topk:2"
    arguments += " --m 3 --checked-m 1 --iterations 2"
    assert main(["b200", *arguments.split(), "--out", str(path)]) == 0
    assert "please send this file back" in capsys.readouterr().out
    results = read_results(str(path))
    assert results.environment["checked"]["ms"] == [1] and {r.label for r in results.rows} == {
        "torch",
        "torch form=cached_weight",
    }


def test_an_interrupted_check_leaves_the_failures_found(monkeypatch, tmp_path, capsys):
    def checks(*arguments):
        yield TorchTactic("cached_weight"), "M=1 dense: wrong result"
        raise KeyboardInterrupt

    monkeypatch.setattr(b200, "check_tactics", checks)
    path = tmp_path / "out.json"
    assert main(["b200", "--rehearse", "--device", "cpu", "--backends", "torch", "--out", str(path)]) == 130
    results = read_results(str(path))
    assert not results.rows and results.interrupted == "Ctrl-C"
    assert [a.reason for a in results.absent] == ["M=1 dense: wrong result"]
    assert "M=1 dense: wrong result" in capsys.readouterr().out


def test_our_times_stand_beside_the_published_ones():
    ours = _cute_row(256, 60.0)
    text = b200.beside_published(
        [ours, _cute_row(128, 1.0, tile=(256, 256), cluster=(2, 1)), _cute_row(256, 50.0, error_over_bar=2.0)]
    )
    (line,) = [ln for ln in text.splitlines() if "(256,128)@(2,1)" in ln and " 256 " in ln]
    assert "72.4" in line and "60.0" in line and "1.21" in line
    assert sum("topk:8 cute" in ln for ln in text.splitlines()) == 1
    (line,) = [ln for ln in text.splitlines() if "(128,64)@(1,1)" in ln and "pr12686" in ln and " 192 " in ln]
    assert "127.8" in line and "111.9" in line


# --- bench model


def test_model_covers_every_published_row_and_says_how_well(capsys):
    rows = modelled.predictions(shipped_tables()["NVIDIA B200"])
    assert len(rows) == 26 and all(r.fitted and r.left_out and r.floor < r.us for r in rows)
    assert {round(r.us, 2) for r in rows} >= {53.89, 72.43, 75.94}
    assert main(["model", "--device", "B200"]) == 0
    printed = capsys.readouterr().out
    assert "leave-one-out" in printed and "modelled" in printed and printed.count("pr12686") >= 12


def test_the_b200_decision_can_be_asked_for_without_one():
    decision = choose(
        Fc2Problem(256, 7168, 65536, 256, capability=B200.capability), B200, Measured(shipped_tables()["NVIDIA B200"])
    )
    assert isinstance(decision.tactic, CuteTactic) and isinstance(B200, DeviceInfo)


# --- without a GPU


def test_a_default_run_on_a_cpu_also_checks_kernels_and_shows_expectations(monkeypatch, capsys):
    done = []

    def run(arguments, environment):
        done.append((arguments, dict(environment)))
        if "--json" not in arguments:
            return ""
        with open(arguments[arguments.index("--json") + 1], "w") as stream:
            write_json(
                Results(dict(ENVIRONMENT), [row(3, 1.0, "triton"), row(20, 1.0, "triton", error_over_bar=0.5)]),
                stream,
            )
        return ""

    monkeypatch.setattr(laptop, "_run", run)
    monkeypatch.setattr(shootout, "run", lambda options, report, keep: Results({**ENVIRONMENT, "device": "CPU (some)"}))
    assert main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "right: 0.99 of the accuracy bar, 2 results" in printed
    assert "right, no race, deadlock" in printed or "not installed" in printed
    assert re.search(r"B200 +128 +cute \(256,128\)@\(2,1\) +rule", printed)
    assert re.search(r"B200 +32 .* published +52\.1 +33\.2", printed)
    assert sorted(len(environment) for _, environment in done) == [0, 0, 1]
    assert {"TRITON_INTERPRET": "1"} in [environment for _, environment in done]
    # A run with a question of its own gets its answer alone.
    assert main(["--device", "cpu", "--m", "8"]) == 0
    assert "Expected on GPUs" not in capsys.readouterr().out


def test_a_kernel_check_that_fails_says_how(monkeypatch):
    assert laptop._run(["-c", "import sys; sys.exit('out of luck')"], {}) == "out of luck"
    assert laptop._run(["-c", "pass"], {}) == ""
    monkeypatch.setattr(laptop, "_run", lambda arguments, environment: "AssertionError: 3 elements miss the bar")
    assert laptop.interpreted_triton().outcome.startswith("not run")
    for check in (laptop.emulated_cute, laptop.emulated_hopper):
        assert re.search("FAILED: AssertionError|not installed", check().outcome)


# --- pictures and the page


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'fc2-dispatch[bench]'")
    from bench.report import page

    results = shoot_out()
    results.rows = [dataclasses.replace(r, label=r.label.replace("split", "<split&")) for r in results.rows]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(results, with_published=True), encoding="utf-8")
    return path


def test_the_page_is_self_contained(report):
    text = report.read_text()
    assert text.count("<svg") == 8 and "<script" not in text
    # Nothing is fetched: addresses occur only as names of XML namespaces.
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text) + re.findall(r"url\(([^#)][^)]*)\)", text)
    assert loaded and all(link.startswith("data:image/png;base64,") for link in loaded)  # the heat maps
    assert "&lt;split&amp;" in text and "<split&" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    clips = [name for name in ids if re.fullmatch(r"p[0-9a-f]{10}", name)]
    assert clips and len(clips) == len(set(clips))
    assert text.count('class="best"') == 10 and text.count('class="wrong"') == 10


def test_the_page_renders_in_a_browser(report):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    image = pytest.importorskip("PIL.Image")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={report.parent}/profile",
    ]
    picture = report.parent / "page.png"
    subprocess.run(
        [*command, "--window-size=1300,1600", f"--screenshot={picture}", report.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = image.open(picture).convert("RGB")
    assert pixels.size == (1300, 1600)
    colours = {colour for count, colour in pixels.getcolors(1 << 24) if count > 30}
    # The curves of triton and of torch, the heat map's best cell, and the table's mark of the fastest row.
    for wanted in ((0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (253, 231, 37), (0xE8, 0xF4, 0xEA)):
        assert any(max(abs(a - b) for a, b in zip(wanted, colour)) <= 2 for colour in colours), wanted


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    from bench.plots import write_png

    write_png(shoot_out(ms=(1, 128)), str(tmp_path / "plots.png"), with_published=True)
    assert min(image.open(tmp_path / "plots.png").size) > 1000
    assert main(["model", "--plot", str(tmp_path / "model.png")]) == 0
    assert image.open(tmp_path / "model.png").size[0] > 500
