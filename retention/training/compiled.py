"""A training step through the compiler without the machine: what each chip holds, and what the chips exchange."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import aot
from retention import gates
from retention.compiled import parameters
from retention.model import Config
from retention.training import sharding
from retention.training.step import init_state, make_optimizer, make_step


class Step(NamedTuple):
    """A model of retention/compiled.py trained as configs/qwen3_4b.py:`data` says on rows of `length` tokens, one for each device of data and fsdp."""

    model: str
    data: str
    length: int
    topology: str
    mesh: dict[str, int]

    @property
    def label(self) -> str:
        return f"{self.model}-{self.length // 1024}K-{self.topology}"


STEPS = (
    Step("qwen3_4b", "math", 32_768, "v5e:4x4", {"fsdp": 4, "context": 4}),
    Step("qwen3_4b", "instruct", 131_072, "v5p:4x4x4", {"fsdp": 8, "context": 8}),
    Step("qwen3_4b", "instruct", 131_072, "v5p:2x2x1", {"fsdp": 4}),
    Step("qwen3_8b", "math", 32_768, "v5e:8x8", {"fsdp": 16, "context": 4}),
    Step("qwen3_4b", "math", 32_768, "v5p:8x8x8", {"data": 8, "fsdp": 64}),
    *(Step("qwen3_4b", "math", length, "v5p:2x2x1", {"fsdp": 4}) for length in (8192, 16_384, 32_768, 65_536)),
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def compile_step(config, model: Config, topology: str, length: int, mesh_shape: Mapping[str, int]):
    """The step of an experiment's config for a TPU topology such as "v5e:4x4", one row of `length` tokens on each data and fsdp device; jax's Compiled."""
    mesh = sharding.make_mesh(mesh_shape, aot.topology(topology))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding.check(mesh, model, rows, length)
    gate, optimizer = gates.GateConfig(**config.gate), make_optimizer(config.optimizer, config.steps)
    params = parameters(model, config.dtype)
    state = jax.eval_shape(lambda: init_state(gates.init(model, gate), optimizer))
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), jnp.int32) | dict.fromkeys(("answer", "other"), jnp.bool)
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in batch.items()}
    copied = NamedSharding(mesh, P())
    places = sharding.state_sharding(mesh, state), sharding.params_sharding(mesh, params), NamedSharding(mesh, sharding.BATCH), copied
    step = jax.jit(make_step(model, gate, optimizer, config.loss, mesh), in_shardings=places, out_shardings=(places[0], copied), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, params, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """What a step exchanges, from the TPU compiler's HLO: kind of collective -> (how often it runs, bytes in all).

    Bytes are those of the whole array that one device has after an all-gather or all-reduce, or before a reduce-scatter. A loop counts as often as its
    condition says; the loss's, whose blocks depend on the labels, once.
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    # The compiler cuts one collective into several fusions, each of which shows it; its channel, within a loop, tells that they are one.
    channels: dict[tuple, tuple[int, int]] = {}

    def walk(name: str, loop: str, times: int) -> None:
        for line in bodies[name].splitlines():
            if operation := re.search(r" = (.*?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(.*?channel_id=(\d+)", line):
                shapes, kind, channel = _shapes(operation[1]), operation[2], operation[3]
                if "all-reduce-scatter" in name:  # all-reduce and the slice of it that is this device's, which run as one
                    kind = "reduce-scatter"
                size = max(shapes) if "-start(" in line else sum(shapes)  # a start's type has operand, result and flags
                channels[kind, loop, channel] = times, times * size
            if inner := re.search(r" while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                bound = re.findall(r"s32\[\]\S* constant\((\d+)\)", bodies[inner[1]])
                walk(inner[2], inner[2], times * (int(bound[0]) if bound else 1))
            for callee in re.findall(r"(?:calls|true_computation|false_computation)=%([\w.\-]+)", line):
                walk(callee, loop, times)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"%([\w.\-]+)", branches):
                    walk(callee, loop, times)

    walk(re.search(r"^ENTRY %([\w.\-]+)", text, re.MULTILINE)[1], "", 1)
    found = {}
    for (kind, _, _), (times, size) in channels.items():
        count, total = found.get(kind, (0, 0))
        found[kind] = count + times, total + size
    return found


def _shapes(text: str) -> list[int]:
    """The bytes of each array in an HLO type."""
    return [BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text)]


def largest_array(text: str) -> tuple[int, str]:
    """Bytes and type of the largest array anywhere in a step's HLO."""
    return max((size, found) for found in set(re.findall(r"\w+\[[\d,]+\]", text)) for size in _shapes(found))


def quadratic(text: str, length: int, context: int) -> list[str]:
    """The arrays in a step's HLO that have a row's `length` tokens along one axis, and all, a device's or half a device's along another."""
    queries = {length, length // context, length // (2 * context)} if context > 1 else {length}
    found = []
    for array in sorted(set(re.findall(r"\w+\[[\d,]+\]", text))):
        axes = [int(n) for n in array.partition("[")[2][:-1].split(",")]
        if length in axes:
            axes.remove(length)
            found += [array] if queries & set(axes) else []
    return found
