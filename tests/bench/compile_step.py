"""Compiles what the steps of a model launch for cards that are not here, and says what does not fit them. Prints JSON
lines, the last with the sums; ends with 1 if a kernel cannot be compiled or has no room.

    python -m tests.bench.compile_step --model llama-3.1-8b --capability 8.9 --shared-kib 99 [--set quantization=int4]

A step of each captured shape, all that sampling can be asked for, and what happens to rows between steps is computed
with tensors that have no memory, by the product's own code; each kernel that would be launched is noted with its types
and constants, and compiled once for every variant, by the installed Triton language. shared_kib: of a program, as the
launcher would have it, with fewer stages where there is no room for all (kernels/jit.py); spilled: bytes of registers
that ptxas puts into memory. Nothing is run, no time is measured. What several GPUs do together is not looked at, nor
what a draft model or a head launches.
Capabilities and shared memory of a program: A100 8.0, 163; A10 and RTX 3090 8.6, 99; L4, L40S and RTX 4090 8.9, 99;
H100 and H200 9.0, 227; B200 10.0, 227; RTX PRO 6000 and RTX 5090 12.0, 99.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from paged_backend.batch import Feature
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.weights import allocate_weights
from paged_backend.runner import builder, placement
from paged_backend.runner.adapter_store import allocate_adapter_store
from paged_backend.runner.cuda_graphs import StepGraphs
from paged_backend.runner.placement import Placement
from paged_backend.runner.step_tensors import DeviceRows
from paged_kernels import device_traits, jit
from paged_kernels.device_traits import DeviceTraits
from tests.bench.geometries import GEOMETRIES, write_geometry

_META = torch.device("meta")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}
_EVERYTHING = 2 * Feature.BEAM - 1
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants that a step has for it."""

    module: str
    kernel: str
    types: tuple[str, ...]  # of what is no constant, in order; "*" begins a pointer's
    multiples: tuple[bool, ...]  # of 16, each of them
    constants: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"


class Recorder:
    """In the place of launches."""

    def __init__(self) -> None:
        self.variants: dict[Variant, jit.Kernel] = {}

    def note(
        self, kernel: jit.Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        types, multiples = [], []
        for argument, fixed in zip(arguments, kernel._fixed, strict=True):
            if isinstance(argument, torch.Tensor):
                types.append("*" + _TYPES[argument.dtype])
                multiples.append(True)
            elif isinstance(argument, float):
                types.append("fp32")
                multiples.append(False)
            else:
                types.append("i32")
                multiples.append(not fixed and argument % 16 == 0)
        function = kernel.jitted.fn
        named = tuple((name, value) for name, value in constants.items() if value is not None)
        variant = Variant(function.__module__, function.__name__, tuple(types), tuple(multiples), named)
        self.variants.setdefault(variant, kernel)


def record(config: EngineConfig, traits: DeviceTraits) -> list[Variant]:
    """What all captured shapes of steps would launch on such a device.

    Raises EngineError if no kernels compute there.
    """
    device_traits._INTERPRETER = traits  # which is what a device without memory is taken for
    device_traits.traits_of.cache_clear()
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, method-assign]
    recorder = Recorder()
    jit.Kernel._launch_compiled = (  # type: ignore[method-assign]
        lambda kernel, grid, arguments, constants: recorder.note(kernel, grid, arguments, constants)
    )
    for found in _kernels():
        found._launch = found._launch_compiled
    builder.place = lambda config, architecture: Placement(_META, *placement._dtypes(config, architecture, _META))
    built = builder.RunnerBuilder(config, lambda sentence: None, open_checkpoint(config))
    if not built._uses_kernels:
        raise EngineError("no kernels compute such a model there: plain torch does (make_ops.kernels_reach says when)")
    with torch.inference_mode():
        weights = allocate_weights(built._architecture, built._place.dtype, _META)
        a, whole = built._architecture, built._checkpoint.architecture
        adapters = allocate_adapter_store(built._config, a, whole, built._place.dtype, _META)
        runner = built._assemble(weights, adapters, built._size_of(built.needs))
        logits = torch.empty(
            max(shape.num_outputs for shape in built._shapes), runner.architecture.num_logits,
            dtype=built._place.dtype, device=_META,
        )  # fmt: skip
        graphs = StepGraphs(
            runner._decoder, runner._sampler, runner._kv_pages, runner._rows, built._shapes,
            runner.limits.max_model_len, logits, lambda work: (None, None),
        )  # fmt: skip
        graphs.run_all(lambda sentence: None)
        masks = (runner._rows.num_rows, -(-runner.limits.vocab_size // 32))
        runner._rows.token_masks = torch.empty(masks, dtype=torch.int32, device=_META)
        for shape in built._shapes[:4]:  # the rest of sampling, which no graph has
            captured = graphs._steps[shape]
            everything = replace(
                captured.sampling(_EVERYTHING), max_len=64, num_bias=4, num_stop=1, num_bad_words=2, num_top_logprobs=5,
                masked=True, beams=torch.empty(1, dtype=torch.int32, device=_META), num_candidates=4,
            )  # fmt: skip
            runner._sampler.sample(captured.logits, everything, runner._rows)
        _between_steps(runner._rows)
    return list(recorder.variants)


def _between_steps(rows: DeviceRows) -> None:
    """What brings rows up to date, and guesses from their text."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=_META)

    for table in (rows.token_ids, rows._parameters, rows.token_masks):
        rows._ops.write_spans(table, ints(8, 4), ints(64))
    rows._ops.update_page_tables(rows.page_table, ints(8, 3))
    rows._copy_pages(ints(8, 2))
    for propose in (rows._ops.propose_ngram, rows._ops.propose_repeated):
        propose(rows.token_ids, ints(rows.num_rows), ints(8), ints(8))


def _kernels() -> list[jit.Kernel]:
    modules = [module for name, module in sys.modules.items() if name.startswith("paged_kernels.")]
    return [found for module in modules for found in vars(module).values() if isinstance(found, jit.Kernel)]


def compile_variant(variant: Variant, capability: int, shared_bytes: int) -> dict[str, Any]:
    """A row of the result. As the launcher, with fewer stages until there is room."""
    module = __import__(variant.module, fromlist=["_"])
    kernel = getattr(module, variant.kernel)
    given, stages = dict(variant.constants), None
    row: dict[str, Any] = {"kernel": variant.name, "constants": _spelt(given)}
    while True:
        try:
            row |= _compiled(kernel.jitted, variant, given, capability)
        except Exception as error:
            return row | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"}
        if row["shared_kib"] * 1024 <= shared_bytes:
            return row if stages is None else row | {"stages": stages}
        name = "STAGES" if "STAGES" in given else "num_stages"
        stages = given.get(name, 3) - 1
        if stages == 0:
            return row | {"error": "no room in shared memory"}
        given[name] = stages


def _compiled(jitted: Any, variant: Variant, given: dict[str, Any], capability: int) -> dict[str, Any]:
    names = jitted.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    free = [name for name in names if name not in constants]
    signature = dict.fromkeys(names, "constexpr") | dict(zip(free, variant.types, strict=True))
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, multiple in zip(free, variant.multiples, strict=True)
        if multiple
    }
    source = ASTSource(
        jitted, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    options = {name: given[name] for name in _OPTIONS if name in given}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "shared_kib": round(found.metadata.shared / 1024, 1),
        "spilled": _spilled(found.asm["ptx"], capability),
    }


def _spilled(ptx: str, capability: int) -> int:
    """Bytes, as ptxas says when it reads the PTX again."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
        command = [get_ptxas(capability).path, f"-arch={target}", "-v", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


def _spelt(constants: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in constants.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--capability", default="8.9", help="of the card")
    parser.add_argument("--shared-kib", type=int, default=99, help="that a program may have there")
    parser.add_argument("--multiprocessors", type=int, default=108)
    parser.add_argument("--kernels", default="", help="only those whose name has this in it")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    args = parser.parse_args()
    options: dict[str, Any] = {
        "load_format": "dummy",
        "max_model_len": 4096,
        "max_num_sequences": 256,
        "num_pages": 257,
    }
    options |= dict(option.split("=", 1) for option in args.options)
    major, minor = (int(part) for part in args.capability.split("."))
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = EngineConfig.parse({"model": str(write_geometry(args.model, Path(folder) / "model")), **options})
            variants = record(config, DeviceTraits(True, (major, minor), args.multiprocessors))
        except EngineError as error:
            parser.error(str(error))
    counted = len(variants)
    variants = [variant for variant in variants if args.kernels in variant.name]
    print(f"{len(variants)} of {counted} variants", file=sys.stderr, flush=True)
    started, rows = time.monotonic(), []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row in pool.map(
            compile_variant, variants, [10 * major + minor] * len(variants), [1024 * args.shared_kib] * len(variants)
        ):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(
        json.dumps(
            {
                "model": options.get("model", args.model),
                "capability": args.capability,
                "variants": len(rows),
                "errors": sum("error" in row for row in rows),
                "fewer_stages": sum("stages" in row for row in rows),
                "spilling": sum(row.get("spilled", 0) > 0 for row in rows),
                "seconds": round(time.monotonic() - started),
            }
        )
    )
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
