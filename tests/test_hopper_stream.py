"""The streaming kernel for SM 9.0 on the emulator: race checks on, and the elementwise float64 bar."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from backends.cute import resources
from backends.hopper import compiler, stream_plan
from backends.hopper.stream_plan import StreamConfig
from backends.hopper.tactic import HopperTactic, stream_config
from backends.problem import Fc2Problem
from tests import hopper_emulation as emulation

SMALL = StreamConfig(rows=64, phases=2, stages=3, slots=4, tokens=64, experts=5, chunks=1, out_dtype="bfloat16")


def quarter(m: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Alpha of both signs, a quarter nonzero of all, and of what the kernels look at: the most that this one takes."""
    values = torch.randn((m, experts), generator=generator)
    for part in (emulation.looked_at(values), ~emulation.looked_at(values)):
        places = part.nonzero()
        dropped = places[torch.rand(len(places), generator=generator).argsort()[len(places) // 4 :]]
        values[tuple(dropped.T)] = 0
    return values


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    ("config", "m", "n"),
    [
        (SMALL, 1, 64),
        (SMALL, 7, 100),
        (replace(SMALL, out_dtype="float32"), 64, 72),
        (replace(SMALL, phases=4, stages=5, slots=6, experts=6, out_dtype="float16"), 33, 192),
        (replace(SMALL, rows=32, phases=3, stages=4, experts=9, chunks=2), 40, 70),
        (replace(SMALL, tokens=384, experts=4, stages=2, slots=4), 96, 64),  # about 24 tokens an expert
        (replace(SMALL, phases=5, stages=2, slots=5, experts=12), 40, 70),  # three rings of stages in work
        (replace(SMALL, rows=32, phases=8, stages=8, slots=5, tokens=128, experts=3), 129 - 1, 40),
        (replace(SMALL, rows=32, phases=3, stages=3, slots=5, tokens=512, experts=7), 130, 40),  # items in no order
        (replace(SMALL, rows=32, phases=3, stages=2, slots=4, tokens=512, experts=9, chunks=2, cluster=2), 70, 70),
        (replace(SMALL, cluster=2), 7, 50),  # all rows of the second CTA lie past the last
        (replace(SMALL, phases=3, slots=5, cluster=2, out_dtype="float32"), 48, 192),  # two clusters for three strips
        (replace(SMALL, rows=32, experts=9, chunks=2, slots=6, cluster=2), 12, 70),
    ],
    ids=lambda value: f"{value.rows}x{value.phases}x{value.cluster}" if isinstance(value, StreamConfig) else None,
)
def test_quarter_of_alpha(config, m, n, schedule) -> None:
    alpha = quarter(m, config.experts, torch.Generator().manual_seed(m))
    emulation.run(config, m, n, alpha, seed=m, schedule=schedule)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["zero", "one_hot", "one_expert"])
def test_alpha_forms(kind, parts, cluster) -> None:
    """One expert for 64 tokens takes twice as many slots as there are, leaves two of three parts without an item, and its
    activations are gathered here."""
    emulation.run(replace(SMALL, experts=6, cluster=cluster), 64, 96, kind, parts=parts, schedule="lazy")


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    ("config", "m", "n", "parts"),
    [
        (replace(SMALL, out_dtype="float32"), 64, 72, 2),
        (replace(SMALL, experts=9, chunks=2), 21, 64, 4),  # parts begin inside an expert
        (replace(SMALL, rows=32, phases=3, stages=4, slots=5, experts=9, chunks=2, cluster=2), 40, 64, 3),
    ],
)
def test_strips_in_parts(config, m, n, parts, schedule) -> None:
    """At most four blocks or clusters: the emulator starts them in any order, four at a time."""
    alpha = quarter(m, config.experts, torch.Generator().manual_seed(m))
    emulation.run(config, m, n, alpha, seed=m, schedule=schedule, parts=parts)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    ("config", "m", "n", "helpers", "cost"),
    [
        (SMALL, 40, 192, 1, 0),  # three strips of one helper, an item of each
        (replace(SMALL, rows=32, experts=9, chunks=2), 21, 96, 1, 3),
        (replace(SMALL, phases=4, stages=4, tokens=16, experts=40), 16, 128, 2, 4),  # one strip each
        (replace(SMALL, experts=9, chunks=2, cluster=2), 21, 256, 2, 0),  # two strips of each CTA of a pair
        (replace(SMALL, rows=32, phases=3, stages=2, slots=5, tokens=512, experts=12, chunks=2), 70, 90, 1, 2),
        (SMALL, 12, 100, 2, 3),  # a share of one item would cost more
    ],
)
def test_helpers_take_a_share_of_strips(config, m, n, helpers, cost, schedule) -> None:
    alpha = quarter(m, config.experts, torch.Generator().manual_seed(m))
    emulation.run(config, m, n, alpha, seed=m, schedule=schedule, helpers=helpers, cost=cost)


@pytest.mark.parametrize(
    ("hidden", "rows", "cluster", "tokens", "parts", "helpers", "rounds"),
    [
        (7168, 64, 1, 512, 1, 0, 0),
        (2048, 64, 1, 64, 4, 0, 0),
        (2048, 64, 2, 64, 4, 0, 0),
        (2880, 64, 2, 64, 2, 0, 0),
        (2880, 64, 2, 65, 2, 24, 2),
        (5120, 64, 1, 4, 1, 0, 0),
        (5120, 64, 1, 5, 1, 40, 2),
        (6144, 64, 1, 65, 1, 32, 3),
        (64, 32, 1, 512, 8, 0, 0),
    ],
)
def test_as_many_ctas_as_run_at_once(hidden, rows, cluster, tokens, parts, helpers, rounds) -> None:
    division = stream_plan.division(hidden, replace(SMALL, rows=rows, cluster=cluster), tokens, 132)
    assert (division.parts, division.helpers, division.rounds) == (parts, helpers, rounds)


@pytest.mark.parametrize(
    ("hidden", "rows", "cluster", "tokens", "parts", "helpers", "rounds"),
    [
        (7168, 64, 1, 1, 1, 16, 7),
        (7168, 64, 2, 512, 1, 16, 7),
        (2880, 64, 1, 64, 2, 23, 2),
        (4096, 64, 1, 512, 2, 0, 0),  # four are left to the dense kernel
        (8448, 64, 1, 512, 1, 0, 0),
        (64, 32, 1, 512, 8, 0, 0),
    ],
)
def test_helpers_that_a_tactic_asks_for(hidden, rows, cluster, tokens, parts, helpers, rounds) -> None:
    config = replace(SMALL, rows=rows, cluster=cluster)
    division = stream_plan.division(hidden, config, tokens, 132, helpers=True)
    assert (division.parts, division.helpers, division.rounds) == (parts, helpers, rounds)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("multiprocessors", [16, 60, 78, 114, 132])
@pytest.mark.parametrize(("rows", "cluster"), [(32, 1), (64, 1), (64, 2)])
def test_every_strip_has_its_parts_and_a_helper_or_none_has(rows, cluster, multiprocessors, wanted) -> None:
    config = replace(SMALL, rows=rows, cluster=cluster)
    for hidden in range(8, 9000, 264):
        for tokens in (1, 16, 65, 512):
            found = stream_plan.division(hidden, config, tokens, multiprocessors, wanted)
            assert found.strips * rows >= hidden > (found.strips - cluster) * rows and found.strips % cluster == 0
            ctas = found.helpers + found.strips * found.parts
            assert ctas <= multiprocessors or (found.parts, found.helpers) == (1, 0)
            if found.helpers:
                assert found.helpers % cluster == 0
                assert found.helpers * found.rounds >= found.strips > (found.helpers - cluster) * found.rounds


def test_one_expert_of_many_tokens() -> None:
    config = replace(SMALL, tokens=256, experts=4, chunks=2)
    alpha = torch.zeros(200, 4)
    alpha[:, 2] = torch.randn(200, generator=torch.Generator().manual_seed(0))
    emulation.run(config, 200, 64, alpha, schedule="random")


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    ("changes", "m", "n", "kind", "parts"),
    [
        ({}, 1, 64, "dense", 1),
        ({}, 7, 100, "ragged", 1),
        ({}, 16, 72, "dense", 2),
        ({"experts": 261, "cluster": 2}, 9, 70, "ragged", 1),
        ({"chunks": 2, "cluster": 2}, 16, 100, "zero", 3),
        ({"rows": 32}, 16, 64, "one_expert", 1),
    ],
)
def test_few_tokens_are_streamed_whatever_alpha_is(changes, m, n, kind, parts, schedule) -> None:
    emulation.run(replace(SMALL, tokens=16, **changes), m, n, kind, seed=m, schedule=schedule, parts=parts)


@pytest.mark.parametrize("cluster", [1, 2])
def test_nothing_is_written_where_alpha_is_dense(cluster) -> None:
    """The dense kernel takes that call."""
    with pytest.raises(AssertionError, match="got nan"):
        emulation.run(replace(SMALL, cluster=cluster), 8, 64, "dense")


def test_schedules_agree_bit_for_bit() -> None:
    config = replace(SMALL, phases=4, stages=4, experts=12, out_dtype="float32")
    alpha = quarter(48, 12, torch.Generator().manual_seed(5))
    runs = [("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(6))]
    first, *others = (
        emulation.run(config, 48, 80, alpha, seed=3, schedule=schedule, emulator_seed=seed)[0]
        for schedule, seed in runs
    )
    assert all(torch.equal(first, other) for other in others)


def test_division_of_the_work_changes_no_bit() -> None:
    """Sums grow in the order of the experts, whatever the rings and however many consumers."""
    alpha = quarter(40, 8, torch.Generator().manual_seed(9))
    config = replace(SMALL, experts=8, out_dtype="float32")
    variants = [config, replace(config, phases=4, stages=6, slots=9), replace(config, rows=32, phases=5, stages=5)]
    first, *others = (emulation.run(v, 40, 64, alpha, seed=1)[0] for v in variants)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("slots", [4, 5])
def test_a_cluster_changes_no_bit_and_copies_activations_once(slots) -> None:
    """On any schedule of the two CTAs; with an odd number of slots each of them is filled by both in turn."""
    alone = replace(SMALL, experts=8, slots=slots, out_dtype="float32")
    alpha = quarter(40, 8, torch.Generator().manual_seed(9))
    expected, report = emulation.run(alone, 40, 128, alpha, seed=3)
    weights = 2 * 8 * alone.stage_bytes
    activations = report.counter("bulk copy bytes") - weights
    assert activations > 0
    for schedule, seed in (("eager", 0), ("lazy", 0), *(("random", seed) for seed in range(2))):
        out, shared = emulation.run(
            replace(alone, cluster=2), 40, 128, alpha, seed=3, schedule=schedule, emulator_seed=seed
        )
        assert torch.equal(out, expected)
        assert 2 * (shared.counter("bulk copy bytes") - weights) == activations


@pytest.mark.parametrize(
    ("tokens", "tactic"),
    [
        (16, HopperTactic(64, 6, 14)),
        (256, HopperTactic(64, 7, 14)),
        (256, HopperTactic(64, 5, 12, 2)),
        (512, HopperTactic(64, 7, 16)),
        (512, HopperTactic(64, 5, 12, 2)),
    ],
)
def test_machine_code(tokens, tactic, tmp_path) -> None:
    """Nothing spilled, no more registers than a multiprocessor has for all threads, and in a cluster a multicast per slot."""
    tools = [resources.find_tool(name) for name in ("cuobjdump", "nvdisasm")]
    problem = Fc2Problem(tokens, 7168, 65536, 256, b_layout="triton/fragments", capability=(9, 0))
    config = stream_config(problem, tactic, tokens)
    cubin = tmp_path / "stream.cubin"
    options = f"--keep-cubin --dump-dir={tmp_path}"
    cubin.write_bytes(compiler.compile_kernel(config, options=options).artifacts.CUBIN)
    usage, code = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for tool, option in zip(tools, ("--dump-resource-usage", "-c"))
    )
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 65536 // config.threads // 8 * 8
    assert "STACK:0 " in usage and not re.search(r"\b(LDL|STL)\b", code)
    assert len(re.findall(r"\bUBLKCP\S*\.MULTICAST", code)) == (tactic.cluster > 1)


def test_too_many_experts_for_shared_memory() -> None:
    problem = Fc2Problem(512, 7168, 2048 * 256, 2048, b_layout="triton/fragments", capability=(9, 0))
    assert stream_config(problem, HopperTactic(slots=16), 512) is None
