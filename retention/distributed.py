"""Several processes as one program: how they find each other, which of them writes, and what they tell each other."""

import json
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def initialize(coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others; to be called before anything else is asked of JAX.

    On a TPU pod slice, under SLURM, Open MPI and GKE everything is found out and no argument is needed. Elsewhere (GPUs without a scheduler, processes on
    one CPU) all three are: "host:port" of process 0, how many processes there are, and which of them this is, from 0.

    Raises ValueError if the processes cannot be found out and an argument is missing, and for an address without a port.
    """
    given = (coordinator_address, num_processes, process_id)
    if given != (None, None, None) and None in given:
        raise ValueError("give coordinator_address, num_processes and process_id all three, or none of them where they are found out (TPU, SLURM, GKE)")
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"coordinator_address must be host:port, as in localhost:9911, got {coordinator_address!r}")  # JAX dies of a segmentation fault
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # what processes on CPUs talk through; other devices do not ask
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:
        raise ValueError(f"the processes of this program cannot be found out here ({error}); give coordinator_address, num_processes and process_id") from error


def is_primary() -> bool:
    """Whether this is the one process that writes logs, configs and gates."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list:
    """Every process's JSON-able value, in the order of the processes. All must call it."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([text.size])))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    # [processes, bytes]
    everything = np.reshape(multihost_utils.process_allgather(padded), (sizes.size, -1))
    return [json.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)]


def local_rows(target: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a global array [B,T] of which this process's devices hold a part, in order."""
    parts = target.addressable_devices_indices_map(shape).values()
    return sorted({row for rows, _ in parts for row in range(*rows.indices(shape[0]))})


def global_batch(local: Mapping[str, np.ndarray], rows: Sequence[int], target: NamedSharding, shape: tuple[int, int]) -> dict[str, jax.Array]:
    """Global arrays [B,T] from this process's rows of them: local[name] is [len(rows), T], and rows those of `local_rows`."""
    place = {row: i for i, row in enumerate(rows)}

    def part(array):
        return lambda index: array[[place[row] for row in range(*index[0].indices(shape[0]))], index[1]]

    return {name: jax.make_array_from_callback(shape, target, part(array)) for name, array in local.items()}


class Preemption:
    """Tells a loop that its machine is to be taken away: SIGTERM came, to this process or to any other of the program. A context manager.

    Between entering and leaving, SIGTERM does not end the process. (Several processes: JAX's own service catches it, from `initialize` on.)
    """

    def __enter__(self):
        self._asked = False
        self._earlier = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():  # only there Python sets signal handlers
            self._earlier = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error):
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)

    def _ask(self, number, frame):
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this many steps: the same answer in all processes, each of which asks after every step."""
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
