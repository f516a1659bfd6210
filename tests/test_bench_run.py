"""The shoot-out's command line, inputs and checks, and whole runs of it on the CPU."""
from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import Fc2Problem, get, quantize_nvfp4, unregister
from backends.device import DeviceInfo
from backends.torch_baseline import TorchTactic
from bench import options as command_line
from bench import shootout
from bench.__main__ import main
from bench.contestants import Contestant, line_up
from bench.options import pair, parse, pin
from bench.records import read_results
from bench.timing import METHODS, UnavailableMethod, available_methods, choose_method
from dispatch import store
from dispatch.check import errors, references
from dispatch.evidence import Measured
from dispatch.inputs import (
    AlphaForm,
    generator,
    global_factor,
    random_alpha,
    random_operand,
    token_sets,
)
from dispatch.ranges import integers
from tests.reference import half_ulp, reference

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--device",
    "cpu",
    "--n",
    "128",
    "--k",
    "512",
    "--experts",
    "4",
    "--m",
    "1,3",
    "--alpha",
    "topk:2",
    "--backends",
    "torch",
]


# --- the command line


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("8", (8,)),
        ("1,8,8", (1, 8)),
        ("32:128:32", (32, 64, 96, 128)),
        ("3:5", (3, 4, 5)),
        ("64,1:9:4", (1, 5, 9, 64)),
        ("5:6:4", (5,)),
    ],
)
def test_integers(text, numbers):
    assert integers(text) == numbers


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "8:4", "1:2:3:4", "1,,2", "1:0", "2:9:0"])
def test_integers_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError):
        integers(text)


def test_pairs_and_pins():
    assert pair("256,128") == pair("256x128") == (256, 128)
    assert (
        pin("split_k=2") == ("split_k", 2)
        and pin("pdl=true") == ("pdl", True)
        and pin("form=tiled") == ("form", "tiled")
    )
    for broken in ("256", "a,b", "1,2,3"):
        with pytest.raises(argparse.ArgumentTypeError):
            pair(broken)
    for broken in ("split_k", "=2", "split_k=", "2=split_k"):
        with pytest.raises(argparse.ArgumentTypeError):
            pin(broken)


def test_defaults_on_a_cpu():
    found = parse(["--device", "cpu"])
    assert found.shape == command_line.CPU_SHAPE and found.ms == command_line.CPU_MS
    assert found.alphas == (AlphaForm("topk", 8),) and found.cold and found.warmup == 10 and found.iterations == 50
    assert "torch" in found.backends and found.pins == {} and found.out_dtype == torch.bfloat16


def test_axes():
    found = parse(
        "--device cpu --shape mixtral-8x7b-tp8 --alpha dense --alpha skewed:2 --tile 256,128 --tile 128x64 "
        "--cluster 2,1 "
        "--split-k 1,2 --tactic pdl=true --out-dtype float32 --warm-l2 --seed 7".split()
    )
    assert (found.shape.n, found.shape.k, found.shape.experts) == (4096, 14336, 8)
    assert found.alphas == (AlphaForm("dense"), AlphaForm("skewed", 2))
    assert found.pins == {
        "tile_m,tile_n": ((256, 128), (128, 64)),
        "cluster_m,cluster_n": ((2, 1),),
        "split_k": (1, 2),
        "pdl": (True,),
    }
    assert found.out_dtype == torch.float32 and not found.cold and found.seed == 7
    assert parse(["--device", "cpu", "--shape", "mixtral-8x7b-tp8"]).alphas == (AlphaForm("topk", 2),)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--k 100 --experts 4", "multiple of 16"),
        ("--alpha topk:64", "there are 32"),
        ("--alpha topk:0", "alpha form"),
        ("--alpha dense:3", "alpha form"),
        ("--backends torch,nonsense", "'nonsense' is not one of"),
        ("--iterations 0", "at least 1"),
        ("--timer nonsense", "invalid choice"),
        ("--json /nonexistent/x.json", "does not exist"),
        ("--timer graph", "needs a CUDA device"),
        ("--budget 0", "positive number of seconds"),
        ("--device nonsense", "it takes cpu, cuda or cuda:N"),
        ("--device meta", "it takes cpu, cuda or cuda:N"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", *arguments.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_timing_methods_give_reasons():
    assert set(available_methods(CPU)) == set(METHODS)
    assert choose_method("auto", CPU) == "host"
    with pytest.raises(UnavailableMethod, match="needs a CUDA device"):
        choose_method("cupti", CPU)


# --- inputs


def test_operands_are_the_quantizer_s_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr("dispatch.inputs._CHUNK_VALUES", 128 * 64)
    made = random_operand(300, 64, 0.02, generator(CPU, 5))
    source = generator(CPU, 5)
    values = torch.cat([torch.randn((rows, 64), generator=source) for rows in (128, 128, 44)]).mul_(0.02)
    expected = quantize_nvfp4(values, global_scale=global_factor(0.02))
    assert torch.equal(made.data, expected.data) and torch.equal(made.scale, expected.scale)
    restored = made.dequantize() * global_factor(0.02)
    assert (restored - values).norm() / values.norm() < 0.12
    assert restored.std().item() == pytest.approx(0.02, rel=0.05)


def test_alpha_forms():
    source = generator(CPU, 0)
    routed = random_alpha(AlphaForm("topk", 8), 1000, 64, source)
    assert ((routed != 0).sum(1) == 8).all() and torch.allclose(routed.sum(1), torch.ones(1000))
    counts = (routed != 0).sum(0)
    assert counts.min() > 80 and counts.max() < 180  # 125 expected, standard deviation 10.5
    skewed = random_alpha(AlphaForm("skewed", 8), 1000, 64, source)
    counts = (skewed != 0).sum(0).sort().values
    assert ((skewed != 0).sum(1) == 8).all() and counts[-1] > 800 and counts[0] < 80
    assert (random_alpha(AlphaForm("dense"), 5, 64, source) > 0).all()
    with pytest.raises(ValueError, match="selects 8 experts"):
        random_alpha(AlphaForm("topk", 8), 5, 4, source)


def test_the_seed_decides_the_inputs():
    first, second, third = (token_sets(AlphaForm("topk", 2), 5, 64, 4, generator(CPU, seed), 2) for seed in (1, 1, 2))
    assert all(torch.equal(x.alpha, y.alpha) and torch.equal(x.a.data, y.a.data) for x, y in zip(first, second))
    assert not torch.equal(first[0].a.data, third[0].a.data)
    assert not torch.equal(first[0].a.data, first[1].a.data)
    assert first[0].pairs == 10 and 2 <= first[0].active_experts <= 4


# --- the check


def _problem():
    sets = token_sets(AlphaForm("topk", 2), 5, 4 * 48, 4, generator(CPU, 3), 2)
    return sets, random_operand(200, 4 * 48, 0.02, generator(CPU, 4))


def test_the_reference_is_the_tests_reference(monkeypatch):
    monkeypatch.setattr("dispatch.check._CHUNK_VALUES", 48 * 200)  # one expert at a time
    sets, b = _problem()
    for tokens, found in zip(sets, references(sets, b)):
        exact, magnitude = reference(tokens.a, b, tokens.alpha)
        assert torch.allclose(found.value, exact, rtol=1e-12, atol=1e-14 * magnitude.max().item())
        assert torch.allclose(found.magnitude, magnitude, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bar_accepts_one_rounding_and_nothing_worse(dtype):
    sets, b = _problem()
    expected = references(sets, b)
    # The rounding from float64 in one step: float32 in between would round twice, within the bar's other term.
    outs = [r.value.to(dtype) for r in expected]
    found = errors(outs, expected)
    assert found.ok and 0 < found.over_bar <= 1 and found.relative < 4e-3
    worse = [out.clone() for out in outs]
    row, column = divmod(int(expected[0].magnitude.argmax()), 200)
    slack = half_ulp(expected[0].value[row, column], dtype) + 2.0**-18 * expected[0].magnitude[row, column]
    worse[0][row, column] = (expected[0].value[row, column] + 3 * slack).to(dtype)
    assert 1 < errors(worse, expected).over_bar < 6


def test_the_check_sees_what_was_not_written_and_a_wrong_expert():
    sets, b = _problem()
    expected = references(sets, b)
    outs = [r.value.float() for r in expected]
    outs[1][4, 7] = math.nan
    assert errors(outs, expected).over_bar == math.inf
    swapped = references([type(s)(s.a, s.alpha.roll(1, dims=1)) for s in sets], b)
    assert errors([r.value.bfloat16() for r in swapped], expected).over_bar > 10


def test_tokens_that_select_nothing_must_give_zero():
    sets, b = _problem()
    empty = [type(sets[0])(sets[0].a, torch.zeros_like(sets[0].alpha))]
    expected = references(empty, b)
    out = torch.zeros((5, 200))
    assert errors([out], expected).over_bar == 0
    out[0, 0] = 1e-30
    assert errors([out], expected).over_bar == math.inf


# --- whole runs


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    json_file, csv_file, markdown = (str(tmp_path / name) for name in ("r.json", "r.csv", "r.md"))
    code = main(
        [*SMALL, "--iterations", "6", "--warmup", "1", "--json", json_file, "--csv", csv_file, "--markdown", markdown]
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "CPU" in printed and "misses the accuracy bar" in printed
    results = read_results(json_file)
    assert [(r.problem.m, r.label) for r in results.rows] == [
        (m, label) for m in (1, 3) for label in ("torch", "torch form=cached_weight")
    ]
    for r in results.rows:
        assert r.timer == "host" and r.iterations == 6 and r.time.count == 6 and r.reproducible
        assert r.ok == (r.label == "torch") == r.auto
        assert r.pairs == 2 * r.problem.m and (r.problem.n, r.problem.k, r.problem.experts) == (128, 512, 4)
    assert results.environment["seed"] == 0 and not results.interrupted
    with open(csv_file, newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert open(markdown).read().count("| torch") == 4 + 2  # and the summary
    assert main(["compare", json_file, json_file]) == 0


def test_absent_backends_are_listed_with_their_reasons(capsys):
    main([*SMALL[:-1], "cute,torch", "--m", "1", "--iterations", "1"])
    assert "did not run" in capsys.readouterr().out


def test_pinned_tactics(tmp_path):
    path = str(tmp_path / "r.json")
    main([*SMALL, "--m", "1", "--iterations", "1", "--tactic", "form=experts", "--json", path])
    assert [r.label for r in read_results(path).rows] == ["torch"]


class _Wrong:
    """Stands in for dispatch.fc2; spoils what a test asks it to spoil."""

    def __init__(self, spoil):
        self.spoil, self.calls, self.original = spoil, 0, shootout.dispatch.fc2

    def __call__(self, *args, out, **kwargs):
        self.original(*args, out=out, **kwargs)
        self.calls += 1
        self.spoil(self.calls, out)


@pytest.mark.parametrize(
    "spoil, over_bar, reproducible",
    [
        (lambda call, out: out[0].zero_(), 10.0, True),
        (lambda call, out: out.mul_(1 + 0.02 * (call % 2)), 0.0, False),
        (lambda call, out: out.fill_(math.nan) if call > 2 else None, math.inf, True),
    ],
    ids=["a wrong row", "not reproducible", "right only while warming up"],
)
def test_a_wrong_kernel_is_found_out(monkeypatch, spoil, over_bar, reproducible):
    monkeypatch.setattr(shootout.dispatch, "fc2", _Wrong(spoil))
    results = shootout.run(
        parse([*SMALL, "--tactic", "form=experts", "--m", "3", "--iterations", "4", "--warmup", "1"])
    )
    (found,) = results.rows
    assert not found.ok and found.error_over_bar >= over_bar and found.reproducible == reproducible


def test_a_contestant_that_fails_costs_only_itself(monkeypatch):
    original = shootout.dispatch.fc2

    def fails(*args, tactic, **kwargs):
        if tactic == TorchTactic("cached_weight"):
            raise RuntimeError("out of something\nwith details")
        return original(*args, tactic=tactic, **kwargs)

    monkeypatch.setattr(shootout.dispatch, "fc2", fails)
    results = shootout.run(parse([*SMALL, "--m", "1", "--iterations", "2"]))
    assert [r.label for r in results.rows] == ["torch"]
    assert [(a.label, a.reason) for a in results.absent] == [("torch form=cached_weight at M=1", "out of something")]


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    original, calls = shootout.dispatch.fc2, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * (2 + 1 + 8) * 2 - 4:  # two contestants, second M, nearly at its end
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(shootout.dispatch, "fc2", interrupted)
    path = str(tmp_path / "r.json")
    assert main([*SMALL, "--m", "1,2,3", "--iterations", "8", "--warmup", "1", "--json", path]) == 130
    assert "Interrupted" in capsys.readouterr().out
    results = read_results(path)
    assert results.interrupted == "Ctrl-C" and {r.problem.m for r in results.rows} == {1, 2}
    assert all(r.iterations == 8 for r in results.rows if r.problem.m == 1)
    assert all(5 <= r.iterations < 8 and r.problem.m == 2 for r in results.rows if r.iterations != 8)


def test_a_killed_run_leaves_the_token_counts_it_had_finished(tmp_path, capsys):
    path = tmp_path / "r.json"
    script = (
        "import os, signal, sys\nfrom bench import shootout\nfrom bench.__main__ import main\n"
        "original = shootout._Stage.measure\n"
        "def killed(self, alpha, m, *rest):\n"
        "    if m == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, alpha, m, *rest)\n"
        "shootout._Stage.measure = killed\nmain(sys.argv[1:])\n"
    )
    arguments = [*SMALL, "--m", "1,2,3", "--iterations", "5", "--json", str(path)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    results = read_results(str(path))
    assert {r.problem.m for r in results.rows} == {1, 2} and results.interrupted == "the end of its process"
    markdown = tmp_path / "r.md"
    assert main(["show", str(path), "--markdown", str(markdown)]) == 0
    assert "Interrupted by the end of its process" in capsys.readouterr().out
    assert markdown.read_text().count("| torch") == 4 + 2  # and the summary


def test_show_refuses_what_is_no_result(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert main(["show", str(path)]) == 2 and "not a shoot-out result" in capsys.readouterr().err


def test_a_device_that_fails_leaves_what_was_measured(monkeypatch, tmp_path, capsys):
    class Dies:
        method = "host"

        def __init__(self, launches):
            self.m = launches[0]().shape[0]

        def __call__(self):
            if self.m == 3:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
            return 1e-3

    monkeypatch.setattr("bench.timing.HostRunner", Dies)
    path = str(tmp_path / "r.json")
    assert main([*SMALL, "--iterations", "5", "--json", path]) == 1
    assert "illegal memory access" in capsys.readouterr().out
    results = read_results(path)
    assert {r.problem.m for r in results.rows} == {1} and "illegal memory access" in results.interrupted


def test_progress_reaches_the_end():
    shares = []
    shootout.run(parse([*SMALL, "--iterations", "2"]), lambda text, share: shares.append(share))
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == pytest.approx(1.0)


def test_the_fastest_that_the_tables_know_takes_part(monkeypatch):
    """Of the form of alpha at hand, and of the backends asked for."""
    monkeypatch.setattr(store, "measured_for", lambda device: Measured(store.shipped_for(device)))
    h200 = DeviceInfo("cuda", "NVIDIA H200", (9, 0), 132)
    problem = Fc2Problem(512, 7168, 65536, 256, b_layout="triton/fragments", capability=(9, 0))
    table = store.shipped_for(h200)

    def fastest(alpha: str, backend: str):
        times = {
            entry.tactic: entry.seconds
            for entry in table.entries
            if (entry.problem.m, entry.problem.k, entry.alpha, entry.tactic.backend) == (512, 65536, alpha, backend)
        }
        return min(times, key=times.get)

    for backend in ("hopper", "triton"):
        options = parse(["--backends", backend])
        for form in (AlphaForm("topk", 8), AlphaForm("dense", 8)):
            found, absent = line_up(problem, h200, options, form, favourite=None)
            assert {c.tactic for c in found} == {fastest(str(form), backend), get(backend).default_tactic(problem)}
        assert len(line_up(problem, h200, options, AlphaForm("skewed", 8), favourite=None)[0]) == 1
    assert fastest("topk:8", "hopper") != get("hopper").default_tactic(problem)
    pinned, _ = line_up(problem, h200, parse(["--tactic", "phases=5"]), AlphaForm("topk", 8), favourite=None)
    assert pinned and {c.tactic.phases for c in pinned} == {5}


def test_labels_are_unique_among_all_tactics():
    for name, capability in (("cute", (10, 0)), ("triton", (9, 0)), ("torch", None)):
        problem = Fc2Problem(64, 7168, 65536, 256, capability=capability)
        labels = [Contestant(tactic, "128x4").label for tactic in get(name).tactics(problem)]
        assert labels and len(labels) == len(set(labels))


def test_json_is_plain(tmp_path):
    path = tmp_path / "r.json"
    main([*SMALL, "--m", "1", "--iterations", "1", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["schema"] == 1 and record["rows"][0]["tactic"]["backend"] == "torch"
    assert record["rows"][0]["problem"]["m"] == 1 and record["rows"][0]["ok"] is True


def test_a_peer_takes_part_when_its_module_registers_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "someones_kernel.py").write_text(
        "from dataclasses import dataclass\n"
        "import dispatch\n"
        "from backends.torch_baseline import TorchBackend, TorchTactic\n"
        "@dataclass(frozen=True)\n"
        "class PeerTactic(TorchTactic):\n"
        "    backend = 'peer'\n"
        "class Peer(TorchBackend):\n"
        "    name, tactic_type = 'peer', PeerTactic\n"
        "    def default_tactic(self, problem):\n"
        "        return PeerTactic()\n"
        "dispatch.register(Peer())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "r.json")
    try:
        assert (
            main(
                [
                    *SMALL,
                    "--peer",
                    "someones_kernel",
                    "--m",
                    "1",
                    "--iterations",
                    "2",
                    "--json",
                    path,
                    "--backends",
                    "peer",
                ]
            )
            == 0
        )
    finally:
        unregister("peer")
    assert [(r.label, r.ok) for r in read_results(path).rows] == [("peer", True)]
    with pytest.raises(SystemExit):
        main([*SMALL, "--peer", "no_such_module"])
    assert "--peer no_such_module" in capsys.readouterr().err
