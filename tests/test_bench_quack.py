"""The comparison with QuACK, with a stand-in for its product: what it is given, and what comes out of each contestant."""

from __future__ import annotations

import sys

import pytest
import torch

from backends.operand import Nvfp4Tensor
from bench import quack
from dispatch.inputs import AlphaForm, generator, random_operand, token_sets
from tests.reference import reference

N, K, E, M = 128, 4 * 48, 4, 5


def product(acts, blob, scale, out, wformat, **how):
    """QuACK's signature on its operands before they are permuted; a tile moves the result, to tell calls apart."""
    assert acts.dtype == torch.bfloat16 and wformat == "nvfp4"
    weights = Nvfp4Tensor(blob, scale, "linear").decode(dtype=torch.float64)
    out.copy_(acts.double() @ weights.t() * (2.0 if how else 1.0))


def test_every_contestant_gets_the_same_values():
    device = torch.device("cpu")
    plain = random_operand(N, K, 0.02, generator(device, 0))
    theirs = (plain.data, plain.to_layout("linear").scale.view(torch.float8_e4m3fn))
    sets = token_sets(AlphaForm("dense"), M, K, E, generator(device, 1), 2)
    found = quack.contestants(product, (128, 64, 7, 1), sets, [plain] * 2, [theirs] * 2)
    assert list(found) == [
        "ours", "quack, its own tile", "alpha, then quack, its own tile", "quack (128, 64, 7, 1)",
        "alpha, then quack (128, 64, 7, 1)", "ours again",
    ]  # fmt: skip
    for i, tokens in enumerate(sets):
        want, _ = reference(tokens.a, plain, tokens.alpha)
        alone, _ = reference(tokens.a, plain, torch.ones_like(tokens.alpha))
        for name, expected in {
            "ours": want, "ours again": want, "quack, its own tile": alone, "quack (128, 64, 7, 1)": 2 * alone,
            "alpha, then quack, its own tile": want, "alpha, then quack (128, 64, 7, 1)": 2 * want,
        }.items():  # fmt: skip
            launch, out = found[name][i]
            out.fill_(float("nan"))
            launch()
            # Activations times alpha are rounded to bfloat16 before the product.
            assert (out.double() - expected).norm() <= 2**-7 * expected.norm(), name


def test_without_a_gpu_or_quack_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quack"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quack.main() == 2 and "SM 9.0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "quack", None)
    assert quack.main() == 2 and "pip install quack-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--m", "0"], ["--samples", "1"], ["--m", "many"]])
def test_bad_counts_are_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["quack", *arguments])
    with pytest.raises(SystemExit):
        quack.main()
    assert arguments[0] in capsys.readouterr().err
