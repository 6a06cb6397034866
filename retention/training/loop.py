"""The training loop: data, steps, metrics, checkpoints that resume exactly, and the gates file at the end. The same from one core to a pod."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from retention import checkpoints, gates
from retention.checkpoints import arrays
from retention.checkpoints import gates as gates_file
from retention.distributed import Preemption, gather_json, global_batch, is_primary, local_rows
from retention.model import Config
from retention.names import check_seed
from retention.runs import RunFolder, replace_text, writing
from retention.training import sharding
from retention.training.checkpointing import FREE, Checkpoints
from retention.training.data import Pipeline
from retention.training.metrics import Meter, TensorBoard
from retention.training.step import gate_input_rms, init_state, make_optimizer, make_step


class Preempted(Exception):
    """SIGTERM came; a checkpoint is written, and the run goes on when it is started again."""


def train(config: ConfigDict, workdir: str | pathlib.Path) -> gates.TrainedGates:
    """Trains gates for a frozen model; a run found in `workdir` goes on from its last checkpoint, and ends as it would have uninterrupted.

    Of several processes (retention.distributed.initialize) all call it with the same arguments, and `workdir` is on a file system that they share.
    Writes workdir/metrics.jsonl (a record a step), tensorboard/, checkpoints/, config.json, data.json (documents read and skipped, by source),
    run_meta.json (its `seconds` are those since its `first_step`), and at last gates.safetensors. Where that exists the run is finished, and its
    gates are returned.

    Raises:
      ValueError: `workdir` holds a run with another config or of another model, its last checkpoint is damaged, or a config entry cannot be.
      FileNotFoundError: no such model, data or gates file to start from.
      FloatingPointError: the loss or its gradient is no number; later steps would only spread it.
      OSError: a checkpoint or a record cannot be written; the checkpoint before is whole.
      Preempted: SIGTERM came.
    """
    if config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, not {config.checkpoint_every}")
    check_seed(config.seed)
    run = RunFolder(workdir, config, FREE)
    mesh = sharding.make_mesh(config.mesh)
    section = config.data

    def place(shape: Config, name: str) -> NamedSharding:
        sharding.check(mesh, shape, section.batch_size, section.length)
        return sharding.parameter_sharding(mesh, name)

    model = checkpoints.load(config.model, gates=None, dtype=config.dtype, place=place)
    file = run.path / "gates.safetensors"
    if file.exists():
        if not run.metrics():
            raise ValueError(f"workdir holds {file.name}, which no run here has written, and where this one's would go; move it, or give another folder")
        return gates_file.load(file, model.config)
    if section.length > model.config.max_positions:
        known = f"beyond the {model.config.max_positions} positions that this model knows"
        warnings.warn(f"data.length {section.length} is {known}; of longer documents the gates would learn its errors", stacklevel=2)
    gate = gates.GateConfig(**config.gate)
    optimizer = make_optimizer(config.optimizer, config.steps)
    pipeline = Pipeline(section, model.tokenizer, config.seed)
    loss = config.loss
    for name in ("kl", "ntp", "other_kl", "capacity"):
        if not 0 <= loss[name] < math.inf:
            raise ValueError(f"loss.{name} must be a weight of at least 0, not {loss[name]}")
    if not (pipeline.answers and (loss.kl or loss.ntp)) and not (section.others and loss.other_kl):
        raise ValueError(
            "no token would ever be compared: give loss.kl or loss.ntp a weight and data.sources one with answers, or loss.other_kl a weight and data.others"
        )
    check_data(run, pipeline)
    if is_primary():
        found = {name: {**report, "digest": pipeline.digests[name]} for name, report in pipeline.report.items()}
        replace_text(run.path / "data.json", json.dumps(found, indent=2))
        for source, report in pipeline.report.items():
            for reason, count in report["skipped"].items():
                print(f"data source {source}: {count} skipped: {reason}, first {report['first'][reason]} (data.json)", file=sys.stderr)

    shape, params = model.config, model.params
    state_shapes = jax.eval_shape(lambda: init_state(gates.init(shape, gate), optimizer))
    placed = sharding.state_sharding(mesh, state_shapes)
    step = jax.jit(make_step(shape, gate, optimizer, config.loss, mesh), donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P())))
    key = jax.random.key(config.seed)

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(Checkpoints(run.path / "checkpoints", config.keep_checkpoints))
        whole, target = (section.batch_size, section.length), NamedSharding(mesh, sharding.BATCH)
        mine = local_rows(target, whole)
        rows = stack.enter_context(contextlib.closing(pipeline.rows(mine)))
        batches = (global_batch(embeddable(local, shape), mine, target, whole) for local in rows)
        wanted = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state_shapes, placed)
        # The model's files may change behind config.model; its other labels and another teacher would go unnoticed.
        entries = {**config.to_dict(), "inputs": {"weights": arrays.fingerprint(params), "tokenizer": model.tokenizer.digest()}}
        if restored := saved.restore(wanted, entries):
            state, places = restored
            rows.set_state(places)
        else:
            first_batch = next(batches)
            batches = itertools.chain([first_batch], batches)
            rms = gate_input_rms(shape, mesh, params, first_batch) if config.init_from_data and not config.start_from else None
            start = init_state(start_params(config, shape, gate, rms), optimizer)
            # By way of numpy: on every process the same values, and no weak types, for which the step would be compiled twice.
            state = jax.device_put(jax.tree.map(np.asarray, start), placed)
        first = int(state.step)
        run.keep_metrics([record for record in run.metrics() if record["step"] < first])  # the rest comes again
        board = stack.enter_context(TensorBoard(run.path / "tensorboard", first)) if is_primary() else None
        preemption = stack.enter_context(Preemption())
        progress = stack.enter_context(
            tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", desc="training gates", disable=not is_primary())
        )
        meter = Meter(shape, gate, config.loss.remat)
        pending = None

        def log() -> None:
            """Fetches the pending step's measurements and logs them."""
            if pending is None:
                return
            i, measurements, pairs = pending
            record = meter.record(measurements, pairs)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])):
                raise FloatingPointError(
                    f"at step {i} the loss is {record['loss']} and the norm of its gradient {record['gradient_norm']};"
                    " start again with a lower optimizer.learning_rate"
                )
            run.log(step=i, **record)
            if board:
                board.write(i, record)
            progress.set_postfix_str(
                f"loss {record['loss']:.3f} kl {record['kl']:.3f} retained {record['retained_share']:.3f} {record['tokens_per_second']:.0f} tok/s"
            )

        for i in progress:
            batch = next(batches)
            pairs = attended_pairs(batch)
            state, measurements = step(state, params, batch, key)
            log()  # the step before, while this one runs
            pending = i, measurements, pairs
            saved.check()
            done = i + 1
            stop = preemption.reached(done) and done < config.steps
            if done % config.checkpoint_every == 0 or done == config.steps or stop:
                log()  # a state with NaN in it must not become a checkpoint, nor records be missing before one
                pending = None
                if board:
                    board.flush()
                saved.save(done, state, rows.get_state(), entries)
            if stop:
                saved.wait()
                raise Preempted(f"SIGTERM: stopped after {done} steps; start the same command again, and the run goes on from {saved.folder / str(done)}")
    meta = run.finish(seed=config.seed, steps=config.steps, first_step=first)
    record = {"model": config.model, "config": config.to_dict(), **meta}
    trained = gates.TrainedGates(gate, multihost_utils.process_allgather(state.params, tiled=True), record)
    if is_primary():
        with writing(file):
            gates_file.save(file, trained)
    multihost_utils.sync_global_devices("the gates are written")
    return trained


def check_data(run: RunFolder, pipeline: Pipeline) -> None:
    """Raises ValueError where a source is not what it was when the run began, as its documents would come in another order, or is another on another host."""
    everywhere = gather_json(pipeline.digests)
    file = run.path / "data.json"
    before = json.loads(file.read_text()) if file.exists() and run.metrics() else {}
    for name, digest in pipeline.digests.items():
        if any(other[name] != digest for other in everywhere):
            raise ValueError(f"data.sources.{name} is not the same on all hosts; give them the same files")
        if name in before and before[name].get("digest", digest) != digest:
            raise ValueError(f"data.sources.{name} is not what it was when this run began (data.json); put its files back, or give a new workdir")


def start_params(config: ConfigDict, shape: Config, gate: gates.GateConfig, rms: jax.Array | None) -> dict:
    """The gates that training starts with: fresh ones, or those of config.start_from.

    Raises ValueError for gates there of another kind or shape.
    """
    if not config.start_from:
        return gates.init(shape, gate, config.seed, rms)
    earlier = gates_file.load(config.start_from, shape)
    if dataclasses.replace(earlier.config, bias=gate.bias, sinks=gate.sinks) != gate:
        raise ValueError(f"start_from {config.start_from} holds a {earlier.config}; give config.gate its kind, width and tie_heads, not {gate}")
    return earlier.params


def embeddable(batch: dict[str, np.ndarray], shape: Config) -> dict[str, np.ndarray]:
    """The batch. Raises ValueError for tokens that the embedding has not, as some added ones are: XLA would take others for them."""
    if (largest := batch["tokens"].max()) >= shape.vocab_size:
        rows = f"the model's embedding has {shape.vocab_size} rows"
        raise ValueError(f"a document of data.sources has a token of id {largest}, but {rows}; take out of the texts or the chat template what it stands for")
    return batch


@jax.jit
def attended_pairs(batch: dict) -> jax.Array:
    """How many pairs of a query and a key at or before it in its document the batch has: float32 scalar."""
    return jnp.sum(jnp.where(batch["segment_ids"] > 0, batch["positions"] + 1.0, 0.0))
