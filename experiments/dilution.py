"""Dilution, on paper's conditions: python -m experiments.dilution --workdir=runs/dilution

One head looks one key up among n distractors whose logits come within a margin of the evidence's. As n grows the evidence's attention falls, as the bound
says it must; a gate that knows relevance but for noise evicts all but a fixed budget and restores it, until the noise drowns the evidence. About a minute
on 2 CPU cores. Writes dilution.csv and dilution.png.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import check_arguments
from retention.evaluation import dilution
from retention.evaluation.plots import plot_dilution
from retention.names import check_least, is_whole
from retention.runs import RunFolder, write_table

DEFAULTS = ConfigDict(
    dict(distractors=(16, 64, 256, 1024, 4096, 16384), samples=64, budget=64, margin=4.0, spread=1.0, dim=64, noises=(0.25, 0.5), seed=0)
)
CONFIG = config_flags.DEFINE_config_dict("config", DEFAULTS, lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
flags.mark_flag_as_required("workdir")


@functools.partial(jax.jit, static_argnames=("count", "samples", "dim"))
def problem(key, count: int, samples: int, dim: int, margin: float, spread: float):
    """keys, values [B, n+1, D], query [B, D], evidence [B]: its logit is 10, the distractors' uniform from 10 - margin to 10 - margin + spread."""
    keys = jax.random.split(key, 5)
    query = jax.random.normal(keys[0], (samples, dim))
    query = 10 * query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    evidence = jax.random.randint(keys[1], (samples,), 0, count + 1)
    logit = 10 - margin + spread * jax.random.uniform(keys[2], (samples, count + 1))
    logit = jnp.where(jnp.arange(count + 1) == evidence[:, None], 10.0, logit)
    # Along the query for the logit, and at random across it.
    along = logit * dim**0.5 / 100
    noise = jax.random.normal(keys[3], (samples, count + 1, dim))
    noise -= jnp.einsum("BND,BD->BN", noise, query)[..., None] * query[:, None] / 100
    return along[..., None] * query[:, None] + noise, jax.random.normal(keys[4], noise.shape), query, evidence


def check(config: ConfigDict) -> None:
    """Raises ValueError for what there is no experiment of."""
    check_least(config, {"samples": 2, "budget": 1, "dim": 2, "seed": 0})  # samples: of which a mean has an error
    if not config.distractors or not all(is_whole(count, 1) for count in config.distractors):
        raise ValueError(f"config.distractors must be numbers of at least 1, and one of them or more, got {config.distractors}")


def main(argv):
    check_arguments(argv)
    config = CONFIG.value
    check(config)
    run = RunFolder(WORKDIR.value, config)
    run.keep_metrics([])
    rows = []
    for count in tqdm(config.distractors, unit="size"):
        keys, values, query, evidence = problem(jax.random.key(config.seed), count, config.samples, config.dim, config.margin, config.spread)
        noise = jax.random.normal(jax.random.key(config.seed + 1), keys.shape[:2])
        relevant = (jnp.arange(count + 1) == evidence[:, None]).astype(jnp.float32)
        scores = {"full cache": (noise, None)}
        scores |= {f"gate, noise {level:g}": (relevant + level * noise, config.budget) for level in config.noises}
        scores |= {"window": (jnp.broadcast_to(jnp.arange(count + 1.0), noise.shape), config.budget), "random": (noise, config.budget)}
        for name, (score, budget) in scores.items():
            mass, right = dilution.recall(keys, values, query, score, evidence, budget)
            error = float(jnp.std(mass, ddof=1) / config.samples**0.5)
            rows.append({"cache": name, "distractors": count, "mass": float(mass.mean()), "mass_error": error, "accuracy": float(right.mean())})
            run.log(**rows[-1])
    write_table(run.path / "dilution.csv", rows)
    plot_dilution(rows, config.budget, config.margin, run.path / "dilution.png")
    run.finish(seed=config.seed)
    for row in rows:
        print(f"{row['cache']:16} {row['distractors']:6} distractors: mass {row['mass']:.3f} +- {row['mass_error']:.3f}, recall {row['accuracy']:.2f}")


if __name__ == "__main__":
    app.run(main)
