"""The training loop: data, steps, metrics, checkpoints that resume exactly, and the gates file at the end."""

import functools
import pathlib
import time

import grain
import jax
import jax.numpy as jnp
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

    Writes workdir/gates.safetensors, metrics.jsonl (a record a step), checkpoints/, config.json and run_meta.json.
    """
    run = RunFolder(workdir, config)
    model = checkpoints.load(config.model, dtype=config.dtype)
    gate = gates.GateConfig(**config.gate)
    section = config.data
    encode = functools.partial(model.tokenizer.encode, bos=False)  # documents are encoded in pieces
    source = data.Documents(
        encode, text.load(section.text), section.length, section.targets, section.plain_share, config.seed
    )
    batches = iter(data.batches(source, section.batch_size, config.seed))
    sample = next(iter(data.batches(source, 1, config.seed)))["tokens"]

    optimizer = make_optimizer(config.optimizer, config.steps)
    rms = jax.jit(gate_input_rms, static_argnums=0)(model.config, model.params, sample)
    start = gates.init(model.config, gate, config.seed, rms)
    if config.start_from:
        start = gates_file.load(config.start_from, model.config).params
    state = init_state(start, optimizer)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=config.checkpoint_every, enable_async_checkpointing=False)
    with ocp.CheckpointManager(run.path / "checkpoints", options=options) as manager:
        if manager.latest_step() is not None:
            restored = manager.restore(
                manager.latest_step(),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(batches)),
            )
            state = restored["state"]
        first = int(state.step)
        run.keep_metrics([record for record in run.metrics() if record["step"] < first])
        step = jax.jit(make_step(model.config, gate, optimizer, config.loss), donate_argnums=0)
        key = jax.random.key(config.seed)
        progress = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", desc="training gates")
        for i in progress:
            began = time.time()
            batch = next(batches)
            state, measurements = step(state, model.params, batch, key)
            record = {name: float(value) for name, value in measurements.items()}
            record["tokens_per_second"] = float(batch["length"].sum()) / (time.time() - began)
            if not jnp.isfinite(record["loss"]):
                raise FloatingPointError(f"the loss is {record['loss']} at step {i}; lower optimizer.learning_rate or look at the batch")
            run.log(step=i, **record)
            progress.set_postfix_str(
                f"loss {record['loss']:.3f} kl {record['kl']:.3f} retained {record['retained_share']:.3f} {record['tokens_per_second']:.0f} tok/s"
            )
            done = i + 1
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches))
            manager.save(done, args=args, force=done == config.steps)
    meta = run.finish(seed=config.seed, steps=config.steps)
    record = {"model": config.model, "config": config.to_dict(), **meta}
    trained = gates.TrainedGates(gate, state.params, record)
    gates_file.save(run.path / "gates.safetensors", trained)
    return trained
