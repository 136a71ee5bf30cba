"""Compiles what a launch would compile, for GPUs that are not there; prints one JSON line a kernel.

Run as a script, without `TRITON_INTERPRET`: `python ahead_of_time.py cuda:80 cuda:90 hip:gfx942`. The launchers run
unchanged, on CPU tensors, with Triton told that another GPU is there, and with launches that stop once compiled.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from softprompt_kernels import triton_concat, triton_gradients
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)
        self.get_current_stream = lambda device: 0


def compiled_by(call, target: GPUTarget) -> list:
    """The kernels that `call` launches, compiled for a target and not launched."""
    kernels = []
    driver.set_active(AbsentGPU(target))
    launch = JITFunction.__getitem__

    def compile_only(kernel, grid):
        return lambda *args, **kwargs: kernels.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = compile_only
    try:
        call()
    finally:
        JITFunction.__getitem__ = launch
    return kernels


def launches(dtype: torch.dtype, hidden: int):
    """Every launch, by name: the table and ready embeddings, both sides, all three masks, both gradients."""
    batch, length, longest = 4, 33, 20  # and prompts in float32, as they train
    table = torch.zeros(64, hidden, dtype=dtype)
    text = torch.zeros(batch, length, hidden, dtype=dtype)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    prompts, offsets = torch.zeros(40, hidden), torch.tensor([0, 20, 40])
    tasks = torch.tensor([0, 1, -1, 0])
    concat = functools.partial(triton_concat.concat, max_prompt_length=longest)
    gradient, spans = (
        torch.zeros(batch, length + longest, hidden, dtype=dtype),
        torch.zeros(batch, 3, dtype=torch.int64),
    )
    return {
        "table": lambda: concat(table, ids, prompts, offsets, tasks, ids, ids, True, mask_form="padding"),
        "text": lambda: concat(text, None, prompts, offsets, tasks, ids.bool(), None, False, mask_form="padding"),
        "no mask": lambda: concat(table, ids, prompts, offsets, tasks, None, ids, False, mask_form="padding"),
        "boolean": lambda: concat(table, ids, prompts, offsets, tasks, ids.int(), ids, True, mask_form="boolean"),
        "additive": lambda: concat(table, ids, prompts, offsets, tasks, ids, None, False, mask_form="additive"),
        "prompt gradient": lambda: triton_gradients.prompt_gradient(gradient, spans, offsets, tasks, 40),
        "text gradient": lambda: triton_gradients.text_gradient(gradient, spans, length),
    }


def describe(kernel) -> dict[str, object]:
    """What the assembly says: registers, spills, atomics, and 16-byte accesses of global memory."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        return {
            "registers": count("vgpr_count"),
            "spills": count("vgpr_spill_count") + count("private_segment_fixed_size"),
            "atomics": len(re.findall(r"_atomic_|_atomic\b", text)),
            "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
            "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = Path(f"{kernel.hash}.cubin")
    cubin.write_bytes(kernel.asm["cubin"])
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    usage = run([tools / "cuobjdump", "--dump-resource-usage", cubin]).stdout
    machine_code = run([tools / "cuobjdump", "--dump-sass", cubin]).stdout
    cubin.unlink()
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1)),
        "local accesses": len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)) + len(re.findall(r"\b(?:ATOM\w*|RED)\b", machine_code)),
        "loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", ptx)),
        "stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", ptx)),
        "wide machine loads": len(re.findall(r"LDG\.E(?:\.\w+)*\.128", machine_code)),
        "wide machine stores": len(re.findall(r"STG\.E(?:\.\w+)*\.128", machine_code)),
    }


def main(targets: list[str]) -> None:
    for name in targets:
        backend, arch = name.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
        for dtype_name, dtype in DTYPES.items():
            # One hidden size that is no power of two for all, and a large one once.
            calls = launches(dtype, 576) | {"large": launches(dtype, 4096)["table"]}
            for launch, call in calls.items():
                for kernel in compiled_by(call, target):
                    print(json.dumps({"target": name, "dtype": dtype_name, "launch": launch, **describe(kernel)}))


if __name__ == "__main__":
    main(sys.argv[1:])
