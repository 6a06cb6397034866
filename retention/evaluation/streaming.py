"""Caches that evict while a stream goes by: what every next token costs in them, and against the full cache.

A stream is a prompt and the tokens that follow it, of prose or of the model's own. It is fed in pieces as long as the write buffers, after each of which a
selection follows, as when a model decodes.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import optax

from retention.evaluation import needles
from retention.model import Model
from retention.rows import Rows
from retention.training.documents import ASK, END, SYSTEM, USER


def stories(count: int, seed: int) -> list[needles.Sample]:
    """`count` conversations that begin with a number to remember and the wish for a long story; the number is asked for when that has been told."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        statement, question, value = needles.number(rng)
        wish = f"{statement} Keep it in mind, I will ask you later. Now write a very long story, of many chapters, about {needles.full_name(rng)}."
        samples.append(needles.Sample(SYSTEM + USER + wish + ASK, (f"{END}\n{USER}{question}{ASK}",), (value,)))
    return samples


def tell(model: Model, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int) -> np.ndarray:
    """[B, tokens]: what the model says with its full cache. It is not let end, so that every stream is as long as the others."""
    rows = Rows(model, len(prompts), None)
    rows.append(prompts)
    return np.array(rows.decode_all(tokens, temperature, 1.0, seed, ()))


def follow(caches: Mapping[str, Rows], stream: np.ndarray, piece: int) -> Iterator[tuple[int, str, np.ndarray, np.ndarray | None]]:
    """Feeds stream [B, T] to all caches alike, `piece` tokens at a time. After each yields, for every cache, how many tokens came before, its name, its
    losses at these tokens [B, piece], and its KL(full || cache) there, None unless a cache is named "full"; nats."""
    order = sorted(caches, key=lambda name: name != "full")
    for begin in range(0, stream.shape[1] - piece + 1, piece):
        tokens, full = stream[:, begin : begin + piece], None
        for name in order:
            predicted = jax.nn.log_softmax(caches[name].score(tokens))
            full = predicted if name == "full" else full
            kl = None if full is None else np.asarray(optax.losses.kl_divergence_with_log_targets(predicted, full))
            yield begin, name, np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(predicted, tokens)), kl


def remembered(rows: Rows, samples: Sequence[needles.Sample], max_new_tokens: int = 24) -> list[bool]:
    """Whether each of the rows answers its sample's question."""
    tokenizer = rows.model.tokenizer
    rows.append([tokenizer.encode(sample.questions[0], bos=False) for sample in samples])
    said = map(tokenizer.decode, rows.decode_all(max_new_tokens, 0.0, 1.0, 0, tokenizer.eos_ids))
    return [needles.correct("needle", sample.answers[0], one) for sample, one in zip(samples, said, strict=True)]
