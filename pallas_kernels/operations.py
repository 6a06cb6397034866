"""The operations' real sizes as programs to compile, whatever the operation: what `make aot` and the tests share."""

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import aot

NAMES = ("global_topk", "compact", "ragged_decode", "ragged_prefill", "retention_attention")


@dataclasses.dataclass(frozen=True)
class Program:
    """function(implementation) makes the function to compile; arguments are ShapeDtypeStructs; `donated` names those whose memory is given away."""

    operation: str
    label: str
    function: Callable
    arguments: dict
    donated: tuple[str, ...] = ()


def programs(name: str) -> Iterator[Program]:
    """The programs of operation `name`, one for each case of its table of real sizes; of retention_attention forward and backward."""
    cases = importlib.import_module(f"pallas_kernels.{name}.cases")
    operation = getattr(importlib.import_module(f"pallas_kernels.{name}"), name)
    for label, case in cases.REAL.items():
        given = cases.shapes(case)
        arrays = {key: value for key, value in given.items() if all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))}
        static = {key: value for key, value in given.items() if key not in arrays}

        def function(implementation, static=static):
            return functools.partial(_call, operation, implementation, static)

        yield Program(name, label, function, arrays, ("pool",) if name == "compact" else ())
        if name == "retention_attention":
            yield Program(name, f"{label}, backward", lambda implementation: gradient(function(implementation)), arrays)


def _call(operation: Callable, implementation: str, static: dict, arrays: dict):
    return operation(**arrays, **static, implementation=implementation)


def gradient(attention: Callable) -> Callable:
    """The gradients of retention_attention's four inputs for a loss of output and mass."""

    def loss(inputs, rest):
        out, mass = attention({**inputs, **rest})
        return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(jnp.square(mass))

    def gradients(arrays):
        inputs = {name: arrays[name] for name in ("q", "k", "v", "log_beta")}
        return jax.grad(loss)(inputs, {name: x for name, x in arrays.items() if name not in inputs})

    return gradients


def fits(program: Program, target: str) -> bool:
    """Whether one device of `target` can hold the program's arguments at all."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.arguments)) < aot.HBM_GIB[target] * 2**30


def compile_program(program: Program, target: str) -> dict:
    """Compiles for `target` and returns vmem_bytes (of the hungriest kernel; 0 on a GPU), temp_bytes, alias_bytes and hlo, the optimised program."""
    function = program.function("gpu" if target == "h100" else "tpu")
    donated = {name: x for name, x in program.arguments.items() if name in program.donated}
    kept = {name: x for name, x in program.arguments.items() if name not in program.donated}
    compiled = aot.compile_for(target, lambda donated, kept: function({**donated, **kept}), donated, kept, donate_argnums=0)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "vmem_bytes": max((vmem for line in text.splitlines() if "tpu_custom_call" in line for vmem in used_vmem(line)), default=0),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "hlo": text,
    }


def used_vmem(line: str) -> Iterator[int]:
    """The bytes of memory space 1 that XLA records as used with a kernel call."""
    for found in re.finditer(r'"used_scoped_memory_configs":(\[.*?\])', line):
        for entry in json.loads(found.group(1)):
            if entry["memory_space"] == "1":
                yield int(entry["size"])
