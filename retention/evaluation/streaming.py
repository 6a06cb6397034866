"""Caches that evict while a stream goes by: what every next token costs in them, and against the full cache.

A stream is a prompt and the tokens that follow it, of prose or of the model's own. It is fed in pieces as long as the write buffers, after each of which a
selection follows, as when a model decodes.
"""

import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import optax

from retention.chat import ASK, END, SYSTEM, USER, encoder
from retention.checkpoints import caches
from retention.evaluation import needles
from retention.model import Model
from retention.rows import Rows

ANSWER = 24  # tokens at most, to the question about a stream


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


def follow(rows: Mapping[str, Rows], stream: np.ndarray, piece: int, start: int = 0) -> Iterator[tuple[int, str, np.ndarray, np.ndarray | None]]:
    """Feeds stream [B, T] from `start` on to all caches alike, `piece` tokens at a time. After each yields, for every cache, how many tokens came before,
    its name, its losses at these tokens [B, piece], and its KL(full || cache) there, None unless a cache is named "full"; nats."""
    order = sorted(rows, key=lambda name: name != "full")
    for begin in range(start, stream.shape[1] - piece + 1, piece):
        tokens, full = stream[:, begin : begin + piece], None
        for name in order:
            predicted = jax.nn.log_softmax(rows[name].score(tokens))
            full = predicted if name == "full" else full
            kl = None if full is None else np.asarray(optax.losses.kl_divergence_with_log_targets(predicted, full))
            yield begin, name, np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(predicted, tokens)), kl


def save(folder: pathlib.Path, rows: Mapping[str, Rows], stream: np.ndarray, done: int) -> None:
    """Writes the stream, and the caches as they are after `done` of its tokens, in place of those of an earlier time."""
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, own in rows.items():
        caches.save(partial / name, *own.state(), {})
    np.save(partial / "stream.npy", stream)
    before = list(folder.glob("[0-9]*"))
    partial.rename(folder / str(done))
    for path in before:
        shutil.rmtree(path)


def resume(folder: pathlib.Path, rows: Mapping[str, Rows]) -> tuple[np.ndarray | None, int]:
    """Lets the rows go on from what `save` wrote last; that stream and the tokens of it that were done. None and 0 if there is nothing."""
    done = max((int(path.name) for path in folder.glob("[0-9]*")), default=0)
    if not done:
        return None, 0
    for name, own in rows.items():
        cache, logits, _ = caches.load(folder / str(done) / name, (), "cache", "experiments.stream")
        own.resume(cache, logits)
    return np.load(folder / str(done) / "stream.npy"), done


def remembered(rows: Rows, samples: Sequence[needles.Sample]) -> list[bool]:
    """Whether each of the rows answers its sample's question, within ANSWER tokens."""
    tokenizer = rows.model.tokenizer
    encode = encoder(tokenizer)
    rows.append([encode(sample.questions[0]) for sample in samples], answer=ANSWER)
    said = map(tokenizer.decode, rows.decode_all(ANSWER, 0.0, 1.0, 0, tokenizer.eos_ids))
    return [needles.correct("needle", sample.answers[0], one) for sample, one in zip(samples, said, strict=True)]
