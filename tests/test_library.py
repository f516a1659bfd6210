"""The `torch.library` operators, `torch.compile`, and the imports that must stay optional."""
from __future__ import annotations

import subprocess
import sys

import torch

import dispatch
from backends.torch_baseline import TorchTactic
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference


def operands(m: int = 5):
    a, b = make_operands(m, 48, 3 * 32, seed=m)
    return a, b, make_alpha("dense", m, 3, torch.Generator().manual_seed(m))


def op_arguments(tactic: str = ""):
    a, b, alpha = operands()
    return (a.data, a.scale, a.layout, b.data, b.scale, b.layout, 48, alpha, "torch", tactic)


def test_opcheck():
    torch.library.opcheck(torch.ops.fc2_dispatch.fc2.default, (*op_arguments(), torch.bfloat16))
    out = torch.empty(5, 48, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fc2_dispatch.fc2_out.default, (*op_arguments(), out))


def test_the_operator_computes_what_fc2_does():
    a, b, alpha = operands()
    expected = dispatch.fc2(a, b, alpha, "torch")
    assert torch.equal(torch.ops.fc2_dispatch.fc2(*op_arguments(), torch.bfloat16), expected)
    assert torch.equal(torch.ops.fc2_dispatch.fc2(*op_arguments('{"backend": "torch"}'), torch.bfloat16), expected)


def test_compile_fullgraph_with_changing_tokens():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def layer(a, b, alpha):
        return dispatch.fc2(a, b, alpha, "torch", out_dtype=torch.float32) * 2

    for m in (5, 9, 33):
        a, b, alpha = operands(m)
        exact, magnitude = reference(a, b, alpha)
        assert_meets_bar(layer(a, b, alpha) / 2, exact, magnitude)


def test_compile_fullgraph_with_out_scales_and_tactic():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(a, b, alpha, out):
        return dispatch.fc2(a, b, alpha, out=out, out_dtype=torch.float32, tactic=TorchTactic())

    a, b, alpha = operands()
    b = dispatch.Nvfp4Tensor(b.data, b.scale, b.layout, torch.tensor([0.5, 2.0, -1.0]))
    out = torch.full((5, 48), torch.nan)
    assert_meets_bar(layer(a, b, alpha, out), *reference(a, b, alpha))
    assert not out.isnan().any()


def test_dispatch_imports_with_torch_alone():
    script = (
        "import sys\n"
        "for name in ('triton', 'cutlass', 'cuda', 'cupti', 'tabulate', 'tqdm'): sys.modules[name] = None\n"
        "import torch; known = 'torch._dynamo' in sys.modules\n"
        "import dispatch; assert known or 'torch._dynamo' not in sys.modules, 'seconds for those who compile nothing'\n"
        "a = dispatch.quantize_nvfp4(torch.full((2, 32), 6.0)); b = dispatch.quantize_nvfp4(torch.full((8, 32), 6.0))\n"
        "print(dispatch.fc2(a, b, torch.ones(2, 2)).sum().item())\n"
        "print({name: bool(s) for name, s in dispatch.backends('cpu').items()})\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "18432.0"
