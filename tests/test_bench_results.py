"""Counting, statistics, result files and comparisons of the shoot-out, by value."""
from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from bench import compare
from bench import tables
from bench.__main__ import main
from bench.clocks import Clocks
from bench.contestants import matches
from bench.cupti import graph_launches
from bench.records import (
    Results,
    competitors,
    fastest,
    read_results,
    regrets,
    write_csv,
    write_json,
)
from bench.series import curves, matrix, panels
from bench.stats import Summary, change, geomean, summarize
from bench.tables import LEGEND, cells, render
from dispatch.hardware import GPUS
from tests.bench_samples import ENVIRONMENT, row, shoot_out

# --- statistics of known distributions


def test_summary_of_one_to_a_hundred():
    summary = summarize(list(range(1, 102)))
    assert (summary.median, summary.p10, summary.p90, summary.count) == (51.0, 11.0, 91.0, 101)
    assert summary.spread == pytest.approx(80 / 51)


def test_summary_of_a_normal_and_of_a_heavy_tail():
    source = np.random.default_rng(0)
    normal = summarize(100 + source.standard_normal(200_000))
    assert normal.median == pytest.approx(100, abs=0.02)
    assert normal.p90 - normal.median == pytest.approx(1.2816, abs=0.02)
    assert normal.median - normal.p10 == pytest.approx(1.2816, abs=0.02)
    # A tenth of the samples a hundred times slower moves the mean by a factor of ten and the median hardly.
    tail = summarize(np.where(np.arange(1000) % 10 == 0, 10_000.0, 100.0))
    assert tail.median == 100.0


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [1.0, float("inf")], [0.0, 1.0]])
def test_summary_refuses(samples):
    with pytest.raises(ValueError, match="samples"):
        summarize(samples)


def test_geomean():
    assert geomean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "old, new, margin, verdict",
    [
        (Summary(100, 99, 101, 50), Summary(110, 109, 111, 50), 0.03, "slower"),
        (Summary(100, 99, 101, 50), Summary(90, 89, 91, 50), 0.03, "faster"),
        (Summary(100, 99, 101, 50), Summary(102, 101.5, 103, 50), 0.03, "same"),  # quiet, but inside the margin
        (Summary(100, 80, 120, 50), Summary(110, 90, 130, 50), 0.03, "same"),  # beyond the margin, but noisy
        (Summary(100, 99, 101, 50), Summary(102, 101.5, 103, 50), 0.01, "slower"),
    ],
)
def test_change(old, new, margin, verdict):
    relative, found = change(old, new, margin)
    assert relative == pytest.approx(new.median / old.median - 1)
    assert found == verdict


# --- bytes and FLOPs by value


def test_flops_and_bytes_of_the_deepseek_shape():
    dense = row(m=128, us=100.0, alpha="dense")
    assert dense.problem.flops == 2 * 128 * 7168 * 65536 == 120_259_084_288
    assert dense.tflops == pytest.approx(1202.59084288)
    weights = 234_881_024 + 29_360_128
    activations = 128 * 65536 // 2 + 128 * 65536 // 16
    assert dense.needed_bytes == weights + activations + 128 * 256 * 4 + 128 * 7168 * 2
    assert dense.gbps == pytest.approx(dense.needed_bytes / 100e-6 / 1e9)
    # Half of the experts selected: half of the weights and their scale factors, all of the rest.
    half = dataclasses.replace(dense, active_experts=128.0)
    assert dense.needed_bytes - half.needed_bytes == weights / 2


def test_floors_by_value():
    small, large = row(m=1, us=100.0, alpha="dense"), row(m=384, us=1000.0, alpha="dense")
    assert small.floor_us == pytest.approx(small.needed_bytes / GPUS["H200"].read_bandwidth * 1e6)
    assert large.floor_us == pytest.approx(2 * 384 * 7168 * 65536 / 790e12 * 1e6)
    assert small.percent_of_floor == pytest.approx(small.floor_us)
    routed = row(m=384, us=1000.0)
    assert routed.floor_us < 0.2 * routed.dense_floor_us == pytest.approx(0.2 * large.floor_us)
    assert dataclasses.replace(small, floor_us=None).percent_of_floor is None


# --- who is fastest, regret


def test_fastest_takes_only_right_results():
    rows = [row(us=10.0, error_over_bar=40.0), row(us=20.0, reproducible=False), row(us=30.0), row(us=40.0)]
    assert fastest(rows) is rows[2]
    assert fastest(rows[:2]) is None


def test_regret_is_within_a_form_of_the_weights():
    rows = [
        row(us=100.0, backend="triton", fields={"block_m": 16}, auto=True),
        row(us=80.0, backend="triton", fields={"block_m": 32}),
        row(us=10.0, backend="triton", fields={"block_m": 16}, b_layout="triton/x", auto=True),
        row(us=1.0, fields={"form": "cached_weight"}, error_over_bar=40.0),
    ]
    assert regrets(rows) == {rows[0].key: pytest.approx(0.25), rows[2].key: 0.0}


def test_competitors_share_everything_but_the_tactic():
    results = shoot_out(ms=(1, 8))
    groups = competitors(results.rows)
    assert len(groups) == 4 and all(len(group) == 6 for group in groups.values())
    assert len(panels(results.rows)) == 2


def test_curves_and_matrix():
    rows = next(iter(panels(shoot_out(ms=(1, 8)).rows).values()))
    found = {curve.name: curve for curve in curves(rows)}
    assert set(found) == {"triton, prepared weights", "triton", "torch", "torch(form=cached_weight)"}
    assert found["torch(form=cached_weight)"].kind == "misses bar"
    assert [r.tactic["block_m"] for r in found["triton, prepared weights"].rows] == [16, 16]
    shown = matrix(rows, most=2)
    assert shown.ms == (1, 8) and shown.left_out == 3
    assert shown.labels[0] == "triton(block_m=16,split=2) prepared" and shown.ratios[0] == (1.0, 1.0)


# --- files


def test_json_round_trip():
    results = shoot_out(ms=(1, 384))
    results.interrupted = "Ctrl-C"
    stream = io.StringIO()
    write_json(results, stream)
    again = Results.from_json(json.loads(stream.getvalue()))
    assert again == results
    assert any(r.throttled for r in again.rows)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "not json",
        '{"schema": 99, "rows": [], "environment": {}}',
        '{"schema": 1, "rows": [{}], "environment": {}}',
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="some.json"):
        read_results(str(path))


def test_csv_has_a_line_a_row():
    results = shoot_out(ms=(8, 384))
    stream = io.StringIO()
    write_csv(results, stream)
    stream.seek(0)
    lines = list(csv.DictReader(stream))
    assert len(lines) == len(results.rows)
    assert lines[0]["backend"] == "triton" and lines[0]["m"] == "8" and lines[0]["device"] == "NVIDIA H200"
    assert float(lines[0]["median_us"]) == results.rows[0].time.median
    assert json.loads(lines[0]["tactic"]) == results.rows[0].tactic


def test_clocks_merge():
    merged = Clocks((1900, 1950), 60, ("b",)).merge(Clocks((1400, 1930), 70, ("a",)))
    assert merged == Clocks((1400, 1950), 70, ("a", "b"))
    assert merged.merge(None) is merged


# --- tables


def test_table_marks_what_matters():
    text = render(shoot_out(ms=(384,)))
    labels = {r.label for r in shoot_out(ms=(384,)).rows}
    line = {label: next(ln for ln in text.splitlines() if f" {label}  " in ln) for label in labels}
    assert line["triton(block_m=16,split=2) prepared"].startswith("* ")
    assert "auto +0.0%" in line["triton(block_m=16,split=2) prepared"]
    assert "throttled: software power cap" in line["triton(block_m=16,split=2)"]
    assert "timed with events" in line["torch(form=experts)"]
    assert "misses the accuracy bar" in line["torch(form=cached_weight)"]
    assert "needs an SM 10.0 or 10.3 GPU" in text and LEGEND in text


def test_a_summary_names_the_fastest_right_row_of_each_m():
    rows = shoot_out(ms=(1, 128)).rows
    text = tables.render(shoot_out(ms=(1, 128)))
    assert text.count("Fastest right results") == 2  # one a form of alpha
    lines = tables.summary([r for r in rows if r.alpha == "dense"], tables.regrets(rows))
    best = [fastest(r for r in rows if r.alpha == "dense" and r.problem.m == m) for m in (1, 128)]
    assert [line[:3] for line in lines] == [[str(r.problem.m), r.label, f"{r.time.median:.1f}"] for r in best]
    wrong = [row(us=10.0, error_over_bar=40.0)]
    assert tables.summary(wrong, {}) == []
    assert "Fastest right" not in tables.render(shoot_out(ms=(1,)))


def test_speedup_is_over_the_faster_torch_row():
    rows = [
        row(us=500.0, fields={"form": "experts"}),
        row(us=200.0, fields={"form": "cached_weight"}),
        row(us=50.0, backend="cute"),
    ]
    assert [cells(r, rows, {})[5] for r in rows] == ["0.40", "1.00", "4.00"]


def test_published_times_are_shown_where_m_matches():
    text = render(shoot_out(ms=(128,)), with_published=True)
    assert "(256,128)@(2,1) [pr12686]" in text and "70.2" in text and "not measured here" in text
    assert "pr12686" not in render(shoot_out(ms=(8,)), with_published=True)


def test_an_interrupted_run_says_so():
    results = shoot_out(ms=(8,))
    results.interrupted = "Ctrl-C"
    assert "Interrupted" in render(results, "github")


def test_short_names():
    from backends.cute.budget import CuteTactic
    from backends.torch_baseline import TorchTactic

    assert TorchTactic().brief == "torch"
    assert TorchTactic("cached_weight").brief == "torch form=cached_weight"
    assert CuteTactic(tile_m=256, cluster_m=2, split_k=4).brief == "cute (256,128)@(2,1) split_k=4"


def test_pins():
    record = {"backend": "cute", "tile_m": 256, "tile_n": 128, "split_k": 2}
    assert matches(record, {"tile_m,tile_n": ((256, 128), (128, 64))})
    assert not matches(record, {"tile_m,tile_n": ((128, 256),)})
    assert matches(record, {"split_k": (1, 2)}) and not matches(record, {"split_k": (1,)})
    assert matches({"backend": "triton", "split": 4}, {"split_k": (4,)})
    assert not matches({"backend": "torch"}, {"split_k": (1,)})


def test_cupti_records_become_spans():
    # Two launches, the second one first in the list and with two overlapping kernels; a flush outside any graph.
    records = [(7, 3, 1000, 1400), (7, 3, 1200, 1500), (7, 3, 1900, 2000), (5, 3, 100, 160), (6, 0, 300, 900)]
    assert graph_launches(records) == [(60.0, 60.0), (1000.0, 600.0)]


# --- compare


def _file(tmp_path, name, rows, device="NVIDIA H200"):
    path = tmp_path / name
    with open(path, "w") as stream:
        write_json(Results({**ENVIRONMENT, "device": device}, list(rows)), stream)
    return str(path)


def test_compare_exit_codes(tmp_path, capsys):
    old = [row(8, 100.0, backend="cute"), row(32, 200.0, backend="cute")]
    base = _file(tmp_path, "old.json", old)

    def code(rows, *arguments, **environment):
        return main(["compare", base, _file(tmp_path, "new.json", rows, **environment), *arguments])

    assert code(old) == 0
    assert code([row(8, 101.0, backend="cute"), row(32, 150.0, backend="cute")]) == 0
    assert "1 faster" in capsys.readouterr().out
    slower = [row(8, 120.0, backend="cute"), old[1]]
    assert code(slower) == 1
    assert "+20.0%" in capsys.readouterr().out
    assert code(slower, "--margin", "25") == 0
    assert code(old[:1]) == 1  # a row is gone
    assert "in the old file only" in capsys.readouterr().out
    assert code([*old, row(64, 1.0, backend="cute")]) == 0  # a row more is no regression
    assert code([row(64, 1.0, backend="cute")]) == 2
    assert "no row in common" in capsys.readouterr().err
    assert code([dataclasses.replace(old[0], error_over_bar=3.0), old[1]]) == 1
    assert code([dataclasses.replace(old[0], reproducible=False), old[1]]) == 1
    assert code([row(8, 100.0, backend="triton")]) == 2  # nothing in common
    assert code(old, device="NVIDIA B200") == 2
    assert main(["compare", base, str(tmp_path / "none.json")]) == 2
    (tmp_path / "text.json").write_text("hello")
    assert main(["compare", base, str(tmp_path / "text.json")]) == 2


def test_compare_does_not_mix_methods_or_cache_states():
    old = Results(dict(ENVIRONMENT), [row(timer="cupti"), row(l2="warm")])
    new = Results(dict(ENVIRONMENT), [row(timer="graph")])
    found = compare.compare(old, new, 0.03)
    assert not found.pairs and found.exit_code == 2


def test_methods_agree_within_a_tolerance(tmp_path, capsys):
    cupti = _file(tmp_path, "cupti.json", [row(8, 100.0, timer="cupti"), row(32, 10.0, timer="cupti")])
    graph = _file(
        tmp_path,
        "graph.json",
        [row(8, 104.0, timer="graph"), row(32, 11.5, timer="graph"), row(64, 1.0, timer="graph")],
    )
    assert main(["compare", cupti, graph]) == 2
    assert main(["compare", cupti, graph, "--agree", "3", "2"]) == 0
    assert "2 of 2 rows agree within 3% + 2 us" in capsys.readouterr().out
    assert main(["compare", cupti, graph, "--agree", "3", "0.5"]) == 1
    assert "M=8 topk:8 torch(): cupti 100.0 us, graph 104.0 us" in capsys.readouterr().out
    assert main(["compare", cupti, _file(tmp_path, "none.json", []), "--agree", "3", "2"]) == 2
