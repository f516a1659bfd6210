"""The command line of the shoot-out: parsing, and defaults by device."""
from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass, field
from typing import Mapping, Optional, Sequence

import torch

from backends import registry
from backends.problem import OUT_DTYPES
from backends.tactic import Tactic
from bench.timing import METHODS
from dispatch.inputs import AlphaForm
from dispatch.ranges import integers
from dispatch.shapes import SHAPES, Shape

#: What runs where no GPU is: every backend's code path, in seconds.
CPU_SHAPE = Shape("cpu-small", n=1024, intermediate=256, experts=32, top_k=8)
GPU_SHAPE = SHAPES["deepseek-v3-tp8"]
#: Token counts of the published tables, and a few for a CPU.
GPU_MS = tuple(range(32, 385, 32))
CPU_MS = (1, 32, 128)
#: Seconds of timing per token count.
GPU_BUDGET, CPU_BUDGET = 20.0, 3.0


@dataclass(frozen=True)
class Options:
    """What to measure and how.

    Attributes:
        device: where.
        shape: the weights.
        ms: token counts.
        alphas: forms of alpha.
        out_dtype: of the results.
        backends: names of those that take part.
        pins: tactic fields and the values they may take; empty for no restriction.
        all_tactics: every tactic instead of each backend's default.
        tactics: exactly these, instead of defaults, all or pinned ones; empty for no such list.
        timer: a method, or "auto".
        cold: whether the L2 cache is cold.
        warmup, iterations: calls of each contestant.
        budget: seconds of timing per token count, at most; iterations shrink to keep it.
        copies: copies of B to rotate through; None to choose.
        seed: of the inputs.
    """

    device: torch.device
    shape: Shape
    ms: tuple[int, ...]
    alphas: tuple[AlphaForm, ...]
    out_dtype: torch.dtype = torch.bfloat16
    backends: tuple[str, ...] = ()
    pins: Mapping[str, tuple] = field(default_factory=dict)
    all_tactics: bool = False
    tactics: tuple[Tactic, ...] = ()
    timer: str = "auto"
    cold: bool = True
    warmup: int = 10
    iterations: int = 50
    budget: float = GPU_BUDGET
    copies: Optional[int] = None
    seed: int = 0


def pair(text: str) -> tuple[int, int]:
    """From "256,128" or "256x128"."""
    fields = text.replace("x", ",").split(",")
    if len(fields) != 2 or not all(field.strip().isdigit() for field in fields):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair of numbers such as 256,128")
    return int(fields[0]), int(fields[1])


def pin(text: str) -> tuple[str, object]:
    """From "name=value"; the value is a number, true, false or a word."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a tactic field and its value, such as split_k=2")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value


def _alpha(text: str) -> AlphaForm:
    try:
        return AlphaForm.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to compute")
    what.add_argument("--shape", choices=sorted(SHAPES), help=f"weights by model; default {GPU_SHAPE.name} on a GPU")
    what.add_argument(
        "--m", type=integers, metavar="LIST", help="token counts: 1,8,32:384:32; default 32:384:32 on a GPU"
    )
    what.add_argument("--n", type=int, help="hidden size, instead of the shape's")
    what.add_argument("--k", type=int, help="reduction length over all experts, instead of the shape's")
    what.add_argument("--experts", type=int, help="number of experts, instead of the shape's")
    what.add_argument(
        "--alpha",
        type=_alpha,
        action="append",
        metavar="FORM",
        help="topk:8 (default: the shape's top-k), skewed:8 or dense; may be repeated",
    )
    what.add_argument("--out-dtype", choices=list(OUT_DTYPES), default="bfloat16")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--device", default=None, help="default the current CUDA device, or cpu")
    who = parser.add_argument_group("who takes part")
    who.add_argument("--backends", help="comma-separated names; default all")
    who.add_argument("--all-tactics", action="store_true", help="every tactic, not only each backend's default")
    who.add_argument(
        "--tile", type=pair, action="append", metavar="M,N", help="tactics with tile_m, tile_n; may be repeated"
    )
    who.add_argument("--cluster", type=pair, action="append", metavar="M,N", help="tactics with cluster_m, cluster_n")
    who.add_argument("--split-k", type=integers, metavar="LIST", help="tactics with this split_k (split in Triton)")
    who.add_argument(
        "--tactic", type=pin, action="append", metavar="FIELD=VALUE", help="tactics with this value in this field"
    )
    who.add_argument(
        "--peer", action="append", metavar="MODULE", help="import a module that registers a further backend"
    )
    how = parser.add_argument_group("how to time")
    how.add_argument("--timer", choices=("auto", *METHODS), default="auto", help="default the best available")
    how.add_argument(
        "--warm-l2", action="store_true", help="one input set, no flush; default rotates inputs and flushes"
    )
    how.add_argument("--warmup", type=int, default=10)
    how.add_argument("--iterations", type=int, default=50)
    how.add_argument("--budget", type=float, metavar="S", help="seconds of timing per token count at most")
    how.add_argument("--copies", type=int, help="copies of the weights to rotate through; default by memory, up to 4")


def from_arguments(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Options:
    """Options of parsed arguments; ends the program through `parser.error` where they contradict each other."""
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(f"--device {arguments.device}: it takes cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {arguments.device}: it takes cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device {arguments.device}: torch sees no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    shape = _shape(arguments, device, parser)
    alphas = tuple(arguments.alpha or (AlphaForm("topk", shape.top_k),))
    for form in alphas:
        if form.kind != "dense" and form.top_k > shape.experts:
            parser.error(f"--alpha {form} selects {form.top_k} experts a token and there are {shape.experts}")
    for module in arguments.peer or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.error(f"--peer {module}: {error}")
    names = tuple(arguments.backends.split(",")) if arguments.backends else tuple(registry.names())
    for name in names:
        if name not in registry.names():
            parser.error(f"--backends: {name!r} is not one of {', '.join(registry.names())}")
    for name in ("warmup", "iterations", "copies"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it takes at least 1")
    if arguments.budget is not None and not arguments.budget > 0:
        parser.error(f"--budget is {arguments.budget:g}; it takes a positive number of seconds")
    return Options(
        device=device,
        shape=shape,
        ms=arguments.m or (GPU_MS if device.type == "cuda" else CPU_MS),
        alphas=alphas,
        out_dtype=OUT_DTYPES[arguments.out_dtype],
        backends=names,
        pins=_pins(arguments),
        all_tactics=arguments.all_tactics,
        timer=arguments.timer,
        cold=not arguments.warm_l2,
        warmup=arguments.warmup,
        iterations=arguments.iterations,
        budget=arguments.budget or (GPU_BUDGET if device.type == "cuda" else CPU_BUDGET),
        copies=arguments.copies,
        seed=arguments.seed,
    )


def _shape(arguments: argparse.Namespace, device: torch.device, parser: argparse.ArgumentParser) -> Shape:
    shape = SHAPES[arguments.shape] if arguments.shape else (GPU_SHAPE if device.type == "cuda" else CPU_SHAPE)
    if arguments.n is arguments.k is arguments.experts is None:
        return shape
    n, experts = arguments.n or shape.n, arguments.experts or shape.experts
    k = arguments.k or experts * shape.intermediate
    if experts < 1 or n < 1 or k < 1 or k % experts or (k // experts) % 16:
        parser.error(f"--n {n} --k {k} --experts {experts}: K / E must be a positive multiple of 16")
    return Shape("custom", n, k // experts, experts, min(shape.top_k, experts))


def _pins(arguments: argparse.Namespace) -> dict[str, tuple]:
    """Tactic fields by name; a pair of fields that must match together is keyed "first,second"."""
    pins: dict[str, tuple] = {}
    if arguments.tile:
        pins["tile_m,tile_n"] = tuple(arguments.tile)
    if arguments.cluster:
        pins["cluster_m,cluster_n"] = tuple(arguments.cluster)
    if arguments.split_k:
        pins["split_k"] = arguments.split_k
    for name, value in arguments.tactic or ():
        pins[name] = (*pins.get(name, ()), value)
    return pins


def parse(argv: Sequence[str], parser: Optional[argparse.ArgumentParser] = None) -> Options:
    """Options of a command line without outputs; for tests and other commands."""
    parser = parser or argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(argv), parser)
