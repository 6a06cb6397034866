"""What is left to gain on prose: caches that keep the entries which the text ahead attends to most, as only hindsight knows.

No bound in the strict sense, as the most attended entries are not the best set, but a ranking that knows this much is hard to beat by one that cannot.
"""

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retention.evaluation import prose
from retention.model import Model
from retention.reading import Reading
from retention.rows import Rows


def future_attention(reading: Reading, continuations: Sequence[Sequence[int]]) -> jax.Array:
    """[L,B,H,W] float32: the attention that all of a continuation's tokens pay each entry of the context, mean over its query heads.

    reading: of the contexts, full, for "h2o", whose stat is the attention received.
    """
    stat = reading.full.cache.buffer_stat
    ahead = reading.full.fork()
    ahead.cache = ahead.cache._replace(buffer_stat=jnp.zeros_like(stat))
    ahead.append(continuations)
    return ahead.cache.buffer_stat[..., : stat.shape[3]]


def caches(
    reading: Reading, continuations: Sequence[Sequence[int]], scopes: Sequence[str], budgets: Sequence[float]
) -> Iterator[tuple[str, float, Rows]]:
    """For each scope and budget what is left of the contexts: the entries that the continuations attend to most, and position 0.

    In the reading the future's attention takes the place of the past's.
    """
    rows = reading.read_for("h2o")
    rows.cache = rows.cache._replace(buffer_stat=future_attention(reading, continuations))
    for scope, budget in itertools.product(scopes, budgets):
        yield scope, budget, reading.compress(budget, "h2o", scope, sinks=1, window=0)


def divergences(
    model: Model, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], scopes: Sequence[str], budgets: Sequence[float]
) -> Iterator[dict[str, str | float | list[float]]]:
    """For each scope and budget {scope, budget, kl}: each sequence's KL to the full cache over its continuation, nats, as `prose.divergence` has it."""
    reading = Reading(model, ("h2o",), contexts)
    full = prose.continuation_logits(reading.full, continuations)
    for scope, budget, kept in caches(reading, continuations, scopes, budgets):
        measured = prose.divergence(full, prose.continuation_logits(kept, continuations), continuations)
        yield {"scope": scope, "budget": budget, "kl": [one["kl"] for one in measured]}


def table(measured: Sequence[dict]) -> list[dict]:
    """Of the rows of several batches one for all that agree in everything but kl, with its mean over the sequences and that mean's standard error."""
    together: dict[tuple, list[float]] = {}
    for row in measured:
        together.setdefault(tuple((name, value) for name, value in row.items() if name != "kl"), []).extend(row["kl"])
    rows = [{**dict(named), "samples": len(kl), "kl": round(float(np.mean(kl)), 4)} for named, kl in together.items()]
    for row, kl in zip(rows, together.values(), strict=True):
        row["error"] = round(float(np.std(kl, ddof=1) / len(kl) ** 0.5), 4) if len(kl) > 1 else None
    return rows
