"""The training loop: data, steps, metrics, checkpoints that resume exactly, and the gates file at the end."""

import dataclasses
import functools
import math
import pathlib
import time

import grain
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from tqdm import tqdm

from retention import checkpoints, gates
from retention.checkpoints import gates as gates_file
from retention.runs import RunFolder
from retention.training import data, text
from retention.training.step import gate_input_rms, init_state, make_optimizer, make_step


def train(config: ConfigDict, workdir: str | pathlib.Path) -> gates.TrainedGates:
    """Trains gates for a frozen model; a run found in `workdir` goes on from its last checkpoint, and ends as it would have uninterrupted.

    Writes workdir/metrics.jsonl (a record a step), checkpoints/, config.json, run_meta.json (its `seconds` are those since its `first_step`), and at
    last gates.safetensors. Where that exists the run is finished, and its gates are returned.

    Raises:
      ValueError: `workdir` holds a run with another config, its last checkpoint is damaged, or a config entry cannot be.
      FileNotFoundError: no such model, text or gates file to start from.
      FloatingPointError: the loss or its gradient is no number; later steps would only spread it.
    """
    run = RunFolder(workdir, config)
    model = checkpoints.load(config.model, gates=None, dtype=config.dtype)
    file = run.path / "gates.safetensors"
    if file.exists():
        return gates_file.load(file, model.config)
    gate = gates.GateConfig(**config.gate)
    section = config.data
    encode = functools.partial(model.tokenizer.encode, bos=False)  # documents are encoded in pieces
    source = data.Documents(encode, text.load(section.text), section.length, section.targets, section.plain_share, config.seed)
    batches = iter(data.batches(source, section.batch_size, config.seed))
    sample = next(iter(data.batches(source, 1, config.seed)))["tokens"]

    optimizer = make_optimizer(config.optimizer, config.steps)
    rms = jax.jit(gate_input_rms, static_argnums=0)(model.config, model.params, sample)
    start = gates.init(model.config, gate, config.seed, rms)
    if config.start_from:
        earlier = gates_file.load(config.start_from, model.config)
        if dataclasses.replace(earlier.config, bias=gate.bias, sinks=gate.sinks) != gate:
            raise ValueError(f"start_from {config.start_from} holds a {earlier.config}; give config.gate its kind, width and tie_heads, not {gate}")
        start = earlier.params
    state = init_state(start, optimizer)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(run.path / "checkpoints", options=options) as manager:
        last = manager.latest_step()
        if last is not None:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(batches))
            try:
                state = manager.restore(last, args=args)["state"]
            except Exception as error:  # orbax and grain raise whatever the damage leads to
                damaged = run.path / "checkpoints" / str(last)
                raise ValueError(f"the checkpoint {damaged} cannot be read; delete that folder, and the run goes on from the one before") from error
        first = int(state.step)
        run.keep_metrics([record for record in run.metrics() if record["step"] < first])  # the rest comes again
        step = jax.jit(make_step(model.config, gate, optimizer, config.loss), donate_argnums=0)
        key = jax.random.key(config.seed)
        progress = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", desc="training gates")
        for i in progress:
            began = time.time()
            batch = next(batches)
            state, measurements = step(state, model.params, batch, key)
            record = {name: float(value) for name, value in measurements.items()}
            record["tokens_per_second"] = float(batch["length"].sum()) / (time.time() - began)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])):
                raise FloatingPointError(
                    f"at step {i} the loss is {record['loss']} and the norm of its gradient {record['gradient_norm']};"
                    " start again with a lower optimizer.learning_rate"
                )
            run.log(step=i, **record)
            progress.set_postfix_str(
                f"loss {record['loss']:.3f} kl {record['kl']:.3f} retained {record['retained_share']:.3f} {record['tokens_per_second']:.0f} tok/s"
            )
            done = i + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                manager.save(done, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches)))
    meta = run.finish(seed=config.seed, steps=config.steps, first_step=first)
    record = {"model": config.model, "config": config.to_dict(), **meta}
    trained = gates.TrainedGates(gate, state.params, record)
    gates_file.save(file, trained)
    return trained
