"""What global_topk is run on: small cases that are run everywhere, real ones that are compiled for every accelerator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of C pool slots and S streams of W buffer entries.

    keep: k, as a share of N. lengths: how the pool's slots are shared out: "random", "even" and full, "empty", "one" (nearly all to one stream).
    scores: "normal"; "ties" of five values; "equal", all the same; "special", infinities, zeros of both signs, NaN and denormals among a few numbers.
    valid, protected: the shares of the entries that are.
    """

    batch: int
    streams: int
    slots: int
    width: int
    keep: float = 0.3
    lengths: str = "random"
    scores: str = "normal"
    valid: float = 0.9
    protected: float = 0.01

    @property
    def entries(self) -> int:
        return self.slots + self.streams * self.width


def _small(**options) -> Case:
    # One shape for most of them: each shape is a compilation.
    return Case(**({"batch": 3, "streams": 6, "slots": 1000, "width": 20} | options))


SMALL = {
    "plain": _small(),
    "ties": _small(scores="ties"),
    "equal": _small(scores="equal"),
    "special": _small(scores="special"),
    "none": _small(keep=0),
    "one": _small(keep=0.001, scores="ties"),
    "all": _small(keep=1.0),
    "all_valid": _small(keep=1.0, valid=1.0, lengths="even"),
    "nothing_valid": _small(valid=0.0),
    "all_protected": _small(protected=1.0),
    "empty_pool": _small(lengths="empty", scores="ties"),
    "full_pool": _small(lengths="even", valid=1.0, scores="ties"),
    "one_long_stream": _small(lengths="one", scores="ties"),
    "no_slots": Case(batch=2, streams=5, slots=0, width=7, scores="ties"),
    "no_buffer": Case(batch=1, streams=3, slots=200, width=0, scores="ties"),
    "many_streams": Case(batch=2, streams=700, slots=3000, width=3, scores="ties"),
    # More than a block of 256 rows of 128 and of 4,096 keys.
    "blocks": Case(batch=2, streams=9, slots=33000, width=111, scores="ties"),
}

# The smallest: for the interpreter that looks for races.
SMALLEST = Case(batch=2, streams=2, slots=100, width=5, scores="ties")


def _model(batch: int, budget: int, width: int) -> Case:
    return Case(batch, streams=36 * 8, slots=36 * 8 * budget, width=width, keep=budget / (budget + width), lengths="even", valid=1.0)


def _sized(entries: int) -> Case:
    return Case(batch=1, streams=36 * 8, slots=entries - 36 * 8 * 64, width=64, keep=1 / 16, lengths="random", valid=1.0)


# Qwen3-4B and Qwen3-8B have the same streams: 36 layers of 8 kv heads.
REAL = {
    "qwen3_m512": _model(1, 512, 64),
    "qwen3_m512_b32": _model(32, 512, 64),
    "qwen3_m4096": _model(1, 4096, 256),
    "1m": _sized(1 << 20),
    "4m": _sized(1 << 22),
    "16m": _sized(1 << 24),
}


def shapes(case: Case) -> dict:
    """global_topk's arguments as ShapeDtypeStructs; width, which shapes depend on, as it is."""
    entries = (case.batch, case.entries)
    return dict(
        scores=jax.ShapeDtypeStruct(entries, jnp.float32),
        valid=jax.ShapeDtypeStruct(entries, jnp.bool_),
        protected=jax.ShapeDtypeStruct(entries, jnp.bool_),
        k=jax.ShapeDtypeStruct((case.batch,), jnp.int32),
        starts=jax.ShapeDtypeStruct((case.batch, case.streams + 1), jnp.int32),
        width=case.width,
    )


def arrays(case: Case, seed: int = 0) -> dict:
    """global_topk's arguments, unequal from row to row. What is not valid scores NaN."""
    rng = np.random.default_rng(seed)
    shape = (case.batch, case.entries)
    starts = np.zeros((case.batch, case.streams + 1), np.int32)
    match case.lengths:
        case "random":
            starts[:, 1:] = np.sort(rng.integers(0, case.slots + 1, (case.batch, case.streams)))
        case "even":
            starts[:] = np.arange(case.streams + 1) * case.slots // case.streams
        case "one":
            long = rng.integers(1, case.streams, (case.batch, 1))
            starts[:] = np.where(np.arange(case.streams + 1) > long, case.slots - 3, 2 * (np.arange(case.streams + 1) > 0))
        case "empty":
            pass
    match case.scores:
        case "normal":
            scores = rng.normal(size=shape)
        case "ties":
            scores = rng.integers(-2, 3, shape)
        case "equal":
            scores = np.full(shape, -1.5)
        case "special":
            scores = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 3e38], shape)
    scores = scores.astype(np.float32)
    valid = rng.random(shape) < case.valid
    dead = (np.arange(case.entries) >= starts[:, -1:]) & (np.arange(case.entries) < case.slots)
    valid &= ~dead
    scores[~valid] = np.nan
    return dict(
        scores=jnp.asarray(scores),
        valid=jnp.asarray(valid),
        protected=jnp.asarray(rng.random(shape) < case.protected),
        k=jnp.asarray((round(case.entries * case.keep) - np.arange(case.batch) * (0 < case.keep < 1)).clip(0), jnp.int32),
        starts=jnp.asarray(starts),
        width=case.width,
    )
