"""The Hopper backend without a GPU: its rules, and the small kernels around its main ones, emulated from their PTX."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import backends
from backends import DeviceInfo, Fc2Problem
from backends.hopper import tactic as rules
from backends.hopper.dense_plan import STREAM_TOKENS
from backends.hopper.stream_plan import SMEM_BYTES
from backends.hopper.tactic import PASS_TOKENS, HopperTactic, stream_config
from backends.triton.tactic import PREPARED
from tests.reference import make_operands

TARGET = Fc2Problem(128, 7168, 65536, 256, b_layout=PREPARED, capability=(9, 0))


@pytest.mark.parametrize(
    "problem, tactic, reason",
    [
        (replace(TARGET, b_layout="128x4"), HopperTactic(), "it reads weights from prepare"),
        (replace(TARGET, capability=(8, 0)), HopperTactic(), "machine code for SM 9.0"),
        (replace(TARGET, experts=512), HopperTactic(), "K / E = 65536/512 is not a multiple of 256"),
        (TARGET, HopperTactic(rows=48), "rows is 48; it takes 32 or 64"),
        (TARGET, HopperTactic(phases=9), "phases is 9"),
        (TARGET, HopperTactic(slots=3), "slots is 3; it takes 4 to"),
        (TARGET, HopperTactic(cluster=4), "cluster is 4; it takes 1 or 2"),
        (replace(TARGET, k=256 * 40000, experts=40000), HopperTactic(), "E is 40000"),
    ],
)
def test_each_broken_rule_has_its_reason(problem, tactic, reason):
    support = rules.can_implement(problem, tactic)
    assert not support and reason in support.reason


def test_other_devices_are_refused_with_the_reason():
    backend = backends.get("hopper")
    for device in (DeviceInfo("cpu", "CPU", None, 0), DeviceInfo("cuda", "B200", (10, 0), 148)):
        assert "SM 9.0" in backend.is_supported(device).reason


@pytest.mark.parametrize("m", [1, 16, 17, 256, 257, 384, 385, 512, 513, 1024])
@pytest.mark.parametrize("n, k, experts", [(7168, 65536, 256), (4096, 14336, 8), (2880, 96 * 768, 96)])
def test_every_tactic_fits(m, n, k, experts):
    problem = replace(TARGET, m=m, n=n, k=k, experts=experts)
    tactics = rules.tactics(problem)
    assert tactics[0] == rules.default_tactic(problem)
    for tactic in tactics:
        for tokens in rules.passes(problem):
            config = stream_config(problem, tactic, tokens)
            assert config.tokens >= tokens and config.offsets()["end"] <= SMEM_BYTES
            assert config.phases <= config.stage_barriers and config.threads <= 1024
            one_more = replace(config, stages=config.stages + 1)
            assert config.stages * config.stage_bytes == 54 * 1024 or one_more.offsets()["end"] > SMEM_BYTES


@pytest.mark.parametrize("n", [2048, 7168])
@pytest.mark.parametrize("m", [1, 64, 512, 700])
def test_tactics_of_both_heights_and_clusters_are_tried(n, m):
    tactics = rules.tactics(replace(TARGET, n=n, m=m))
    assert {t.cluster for t in tactics} == {1, 2} and {t.rows for t in tactics} == {32, 64}


def test_names_of_tactics():
    """A cluster of one is not part of the name by which tables know the tactic."""
    assert str(HopperTactic(64, 5, 12)) == "hopper(rows=64,phases=5,slots=12)"
    assert str(HopperTactic(64, 5, 12, 2)) == "hopper(rows=64,phases=5,slots=12,cluster=2)"
    assert str(HopperTactic(64, 5, 12, 1, True)) == "hopper(rows=64,phases=5,slots=12,cluster=1,helpers=True)"


def test_passes_make_up_the_call():
    assert [rules.passes(replace(TARGET, m=m)) for m in (1, PASS_TOKENS, 700, 1024)] == [[1], [512], [512, 188], [512]]


# ---- the launches


@pytest.mark.parametrize("helpers", [False, True])
@pytest.mark.parametrize("m", [16, 40, 700])
def test_launches_of_a_call(m, helpers, monkeypatch):
    """The order of the kernels of each pass, as many values for each DSL kernel as it was compiled for, and helpers where the
    tactic says so: N = 7168 leaves 20 of 132 multiprocessors idle, four of them to the dense kernel."""
    pytest.importorskip("cutlass")
    from types import SimpleNamespace

    from backends.hopper import compiler, launch
    from backends.triton import layout

    order = []
    gpu = DeviceInfo("cuda", "H100", (9, 0), 132)
    monkeypatch.setattr(launch.DeviceInfo, "of", staticmethod(lambda device: gpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def launcher(config):
        kernel = compiler.kernel_of(config)

        def launched(*values):
            assert len(values) == len(kernel.pointers) + kernel.INTEGERS + 1 and all(type(v) is int for v in values)
            order.append(type(kernel).__name__)
            if order[-1] == "StreamKernel":
                assert values[len(kernel.pointers) :][3] == 16 * helpers

        return launched

    problem = replace(TARGET, m=m, k=1280, experts=5)
    a, _ = make_operands(m, 8, problem.k, seed=0)
    out = torch.empty(m, problem.n, dtype=torch.bfloat16)
    prepared = layout.zeros(problem.n, problem.k, torch.device("cpu"))
    alpha = torch.ones(m, problem.experts)
    for first in range(0, m, PASS_TOKENS):
        rows = slice(first, first + PASS_TOKENS)
        launch.run(
            problem,
            HopperTactic(helpers=helpers),
            launcher,
            a.data[rows],
            a.scale[rows],
            prepared,
            alpha[rows],
            out[rows],
        )
    one = ["ListKernel", "StreamKernel", *["DenseKernel"] * (m > STREAM_TOKENS)]
    assert order == one * -(-m // PASS_TOKENS)
