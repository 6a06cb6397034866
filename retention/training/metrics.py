"""What a training step tells: a record of numbers, how fast it was, and TensorBoard's copy of it."""

import contextlib
import ctypes
import gc
import itertools
import os
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import image, scalar

from retention import runs
from retention.gates import GateConfig
from retention.model import Config

# Fields that another run of the same config does not repeat.
CLOCK = ("seconds", "tokens_per_second", "model_flops_per_second", "mfu", "peak_memory_bytes")

# Dense bfloat16 peak of one device as JAX counts devices, in TFLOP/s, by `device_kind`.
# TPUs: the "system architecture" pages of cloud.google.com/tpu/docs; GPUs: NVIDIA's data sheets, without sparsity.
PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,  # v5e
    "TPU v5": 459,  # v5p
    "TPU v5p": 459,
    "TPU v6 lite": 918,  # v6e
    "TPU7x": 2307 / 2,  # a chip is two devices
    "NVIDIA H100 80GB HBM3": 989,  # SXM
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
}


def step_flops(config: Config, gate: GateConfig, remat: bool, tokens: float, pairs: float, compared: float) -> float:
    """Floating point operations of the matrix products of one training step; a multiplication and an addition count as two.

    tokens: that are not padding. pairs: of a query and a key it attends to, sum over tokens of p_t + 1. compared: tokens whose logits are needed.
    With P = the weights of a layer's seven projections (E (2 Q D + 2 H D + 3 F)), A = pairs * Q D * 4 (scores and values), G = the gate's weights:

      teacher forward     L (2 P tokens + A)                      logits 2 E V compared
      student forward     L (2 P tokens + A + 2 G tokens)         logits 2 E V compared
      again with remat    the same, without the logits
      backward            L (2 P tokens + 2 A + 4 G tokens)       logits 2 E V compared

    The weights are frozen, so that backward goes through activations alone: a projection costs as much as forward, not twice as much.
    """
    width = config.query_heads * config.head_dim
    projections = config.embed_dim * (2 * width + 2 * config.kv_heads * config.head_dim + 3 * config.mlp_dim)
    # The sizes between which the gate's matrices lead.
    sizes = [config.embed_dim, *[gate.width] * {"global": 2, "local": 1, "linear": 0}[gate.kind], config.kv_heads]
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    plain, attention, gated = 2 * projections * tokens, 4 * width * pairs, 2 * weights * tokens
    students = 2 if remat else 1
    layer = (students + 2) * plain + (students + 3) * attention + (students + 2) * gated
    return config.layers * layer + 3 * 2 * config.embed_dim * config.vocab_size * compared


def device_bytes(name: str) -> list[int]:
    """This entry of the memory statistics of the process's devices; of those that keep it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return [entry[name] for entry in stats if name in entry]


def peak_memory_bytes() -> int:
    """The most that a device of this process has held; where devices do not say (CPU), the most that the process has."""
    if peaks := device_bytes("peak_bytes_in_use"):
        return max(peaks)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    """Lets `peak_memory_bytes` begin again and returns what is held now. Only Linux's processes can; a device keeps its peak."""
    if held := device_bytes("bytes_in_use"):
        return max(held)
    if sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would hide as much of what comes
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes()


class Meter:
    """Makes a step's record of its measurements. The clock runs from one record to the next, first from the meter's making."""

    def __init__(self, config: Config, gate: GateConfig, remat: bool):
        self._shape = config, gate, remat
        self._last = time.perf_counter()
        self._peak = PEAK_TFLOPS.get(jax.devices()[0].device_kind)

    def record(self, measurements: dict[str, Any], pairs: Any) -> dict:
        """Waits for the measurements of `step` and returns them as numbers and lists, with the CLOCK fields. mfu: None where the device's peak is unknown.

        pairs: see step_flops. tokens_per_second counts no padding.
        """
        record = {name: np.asarray(value).tolist() for name, value in measurements.items()}
        pairs = float(pairs)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        flops = step_flops(*self._shape, record["tokens"], pairs, record["compared"]) / seconds
        return record | {
            "seconds": seconds,
            "tokens_per_second": record["tokens"] / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / (self._peak * 1e12 * jax.device_count()) if self._peak else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }


class TensorBoard:
    """The records of a run in `folder` for TensorBoard. A context manager. Raises OSError if it cannot be written.

    Numbers are curves, retained_by_layer one a layer; kept_share is a picture (rows are layers, columns heads, white is 1). What an earlier start of the
    run wrote from step `first` on is withdrawn.
    """

    # tensorboardX's SummaryWriter hands events to a thread that may lag behind a checkpoint, and a full disk would end it unseen.

    def __init__(self, folder: pathlib.Path, first: int):
        self._file = folder
        with runs.writing(folder):
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # An error that ends the run is the one to be seen.
        with runs.writing(self._file) if kind is None else contextlib.suppress(OSError):
            self._events.close()

    def write(self, step: int, record: dict) -> None:
        values = []
        for name, value in record.items():
            if name == "retained_by_layer":
                values += [scalar(f"{name}/{layer:02}", share) for layer, share in enumerate(value)]
            elif name == "kept_share":
                values.append(image(name, np.kron(value, np.ones((8, 8)))[None]))
            elif value is not None:
                values.append(scalar(name, value))
        self._add(step=step, summary=Summary(value=[one for value in values for one in value.value]))

    def flush(self) -> None:
        with runs.writing(self._file):
            self._events.flush()

    def _add(self, **event) -> None:
        with runs.writing(self._file):
            self._events.write_event(Event(wall_time=time.time(), **event))
