"""Compiling for accelerators that this machine does not have: TPUs through libtpu, an H100 through the CUDA plugin (the extra `aot`).

What does not fit the memory of the chip, breaks a rule of its compiler or asks for too much on-chip memory fails here as it would there. Nothing can be
run: say "compiles for", never "runs on".
"""

import functools
import importlib.util
import os

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

# Generation -> the name of its smallest topology.
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGETS = (*TPUS, "h100")
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96, "h100": 79}  # of one device; a TPU7x chip shows its two cores as two

# What XLA has to know of an H100 SXM, from NVIDIA's data sheet and the CUDA programming guide's table for compute capability 9.0.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
"""


def missing(target: str) -> str | None:
    """Why nothing can be compiled for `target` here, in one sentence; None if it can.

    Raises ValueError for a target that is none of TARGETS.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: known are {', '.join(TARGETS)}")
    package = "jax_plugins.xla_cuda12" if target == "h100" else "libtpu"
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    return None if found else f"compiling for {target} needs {package.partition('.')[2] or package}, which pip install 'retention-kv[aot]' brings"


@functools.cache
def devices(target: str) -> list:
    """The devices of the target's smallest topology, for the shardings of what is to be compiled."""
    from jax.experimental import topologies

    if reason := missing(target):
        raise ValueError(reason)
    jax.local_devices()  # finds jax's plugins, this one among them
    if target == "h100":
        return topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100).devices
    return topology(TPUS[target])


@functools.cache
def topology(name: str) -> list:
    """The devices of a TPU topology by name: "v5e:4x4", "v5p:8x8x8"."""
    from jax.experimental import topologies

    if reason := missing(name.partition(":")[0]):
        raise ValueError(reason)
    jax.local_devices()
    # libtpu looks for the machine it runs on unless told; and two processes may compile at the same time.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compile_for(target: str, function, *arguments, **jit_options):
    """function compiled for one device of `target`. arguments: ShapeDtypeStructs or arrays, of which only shape and dtype count.

    Returns jax's Compiled: memory_analysis(), as_text(). Raises what the target's compiler raises.
    """
    device = devices(target)[0]
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    # The mesh in context is how lowerings learn which chip they lower for.
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("_aot",)).abstract_mesh):
        return jax.jit(function, **jit_options).lower(*arguments).compile()
