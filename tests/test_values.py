"""The plain values: problems, tactics and supports, and their JSON forms."""
from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

import backends
from backends import DeviceInfo, Fc2Problem, Support, Tactic
from backends.torch_baseline import TorchTactic
from tests.reference import assert_meets_bar

PROBLEM = Fc2Problem(m=128, n=7168, k=65536, experts=256, out_dtype=torch.float16, capability=(9, 0))


def test_problem_counts_by_value():
    assert PROBLEM.intermediate == 256
    assert PROBLEM.flops == 2 * 128 * 7168 * 65536
    assert PROBLEM.weight_bytes == 234_881_024 + 29_360_128
    assert PROBLEM.bytes == 264_241_152 + 128 * 65536 * 9 // 16 + 128 * 256 * 4 + 128 * 7168 * 2


def test_problem_survives_json():
    record = json.loads(json.dumps(PROBLEM.to_json()))
    assert record["out_dtype"] == "float16" and Fc2Problem.from_json(record) == PROBLEM
    assert hash(Fc2Problem.from_json(record)) == hash(PROBLEM)
    with pytest.raises(ValueError, match=r"no field \['q'\]"):
        Fc2Problem.from_json({**record, "q": 1})
    with pytest.raises(ValueError, match="out_dtype is 'int8'; accepted: bfloat16"):
        Fc2Problem.from_json({**record, "out_dtype": "int8"})


@dataclass(frozen=True)
class TileTactic(Tactic):
    backend = "tiles"
    tile: int = 128
    fused: bool = False


def test_tactic_survives_json_by_name():
    tactic = TileTactic(tile=64)
    record = json.loads(json.dumps(tactic.to_json()))
    assert record == {"backend": "tiles", "tile": 64, "fused": False}
    assert TileTactic.from_json(record) == tactic
    assert TileTactic.from_json({"fused": True}) == TileTactic(128, True)
    assert str(tactic) == "tiles(tile=64,fused=False)"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"backend": "torch"}, "for backend 'torch', not 'tiles'"),
        ({"tiles": 4}, "TileTactic has no field 'tiles'; it has tile, fused"),
        ({"tile": "64"}, "TileTactic.tile is '64' .str.; it takes int"),
        ({"tile": True}, "TileTactic.tile is True .bool.; it takes int"),
    ],
)
def test_a_bad_tactic_record_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        TileTactic.from_json(record)


@pytest.mark.parametrize("name", backends.names())
def test_every_backends_tactics_survive_json(name):
    backend = backends.get(name)
    for capability in ((8, 0), (9, 0), (10, 0)):
        problem = Fc2Problem(128, 7168, 65536, 256, capability=capability)
        for tactic in backend.tactics(problem):
            assert tactic.backend == name
            assert backend.tactic_type.from_json(json.loads(json.dumps(tactic.to_json()))) == tactic
            assert backend.can_implement(problem, tactic)


def test_support_needs_a_reason_to_refuse():
    assert Support(True) and not Support(False, "why")
    with pytest.raises(ValueError, match="needs a reason"):
        Support(False)


def test_values_are_frozen():
    for value, field in ((PROBLEM, "m"), (TorchTactic(), "form"), (Support(True), "ok"), (DeviceInfo("cpu", "cpu"), "name")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)


def test_device_of_the_cpu():
    assert DeviceInfo.of("cpu") == DeviceInfo("cpu", "cpu") and DeviceInfo.of("cpu").arch == "cpu"
    assert DeviceInfo("cuda", "x", (9, 0)).arch == "SM 9.0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bar_admits_exactly_the_nearest_value(dtype):
    """The accuracy bar of these tests itself: correct rounding passes, the neighbour on either side fails."""
    exact = torch.randn(1, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.cat([exact, exact * 1e-6, 2.0 ** torch.arange(-20.0, 12).double()[None]], dim=1)
    nearest = exact.float().to(dtype)
    zero = torch.zeros_like(exact)
    assert_meets_bar(nearest, exact, zero)
    for target in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(nearest, torch.full_like(nearest, target))
        for column in range(0, exact.shape[1], 97):
            with pytest.raises(AssertionError, match="miss the bar"):
                part = slice(column, column + 1)
                assert_meets_bar(neighbour[:, part], exact[:, part], zero[:, part])
    with pytest.raises(AssertionError, match="1 of"):
        assert_meets_bar(torch.cat([nearest, torch.full((1, 1), torch.nan, dtype=dtype)], 1), torch.cat([exact, exact[:, :1]], 1), torch.zeros(1, exact.shape[1] + 1))
