"""What generation costs: the full cache against a budget, and both against the code of others where it is installed. Ratios within one run."""

import concurrent.futures
import copy
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retention import checkpoints, compiled, policies
from retention.model import Model
from retention.rows import CHUNK, Rows
from retention.training.metrics import device_bytes, forget_peak, peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. contexts, long: tokens read; batches: sequences at a time; budget: tokens per stream; new_tokens: decoded after each context.

    Under the budget 240 tokens nearly fill the write buffer, and the one eviction that follows is timed with them: its share is neither spared nor doubled.
    """

    contexts: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1, 4)
    budget: int = 512
    new_tokens: int = 240
    long: tuple[int, ...] = (8192, 32_768)


@dataclasses.dataclass(frozen=True)
class Served:
    """What `serving_rows` measures: every budget (tokens per stream) for all contexts at once, as its cache does not depend on them, and the full cache of
    each context. rounds of new_tokens after one that is not counted."""

    contexts: tuple[int, ...] = (8192, 32_768, 131_072)
    batches: tuple[int, ...] = (1, 4, 8, 32)
    budgets: tuple[int, ...] = (512, 1024, 2048)
    new_tokens: int = 240
    rounds: int = 2


def take_turns(runs: Mapping[str, Callable[[], Callable]], rounds: int) -> dict[str, list[float]]:
    """Seconds of what each run prepares, everyone once a round, after a round that is not counted."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, prepare in runs.items():
            run = prepare()
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: own[1:] for name, own in seconds.items()}


def rows(model: Model, sizes: Sizes = Sizes(), theirs: "Theirs | None" = None) -> Iterator[dict]:
    """Reading in bounded memory, first, as the peak is the process's; then reading and decoding, everyone by turns."""
    tokens = random_tokens(model, sizes)
    for budget in (sizes.budget, None):
        for length in sizes.long:
            yield long_row(model, tokens[:1, :length], budget)
    for batch, context in itertools.product(sizes.batches, sizes.contexts):
        yield from prefill_rows(model, sizes, theirs, tokens[:batch, :context])
    yield from decoding_rows(model, sizes, theirs)


def decoding_rows(model: Model, sizes: Sizes = Sizes(), theirs: "Theirs | None" = None) -> Iterator[dict]:
    """Decoding behind each context, everyone by turns."""
    tokens = random_tokens(model, sizes)
    for batch, context in itertools.product(sizes.batches, sizes.contexts):
        yield from decode_rows(model, sizes, theirs, tokens[:batch, :context])


def random_tokens(model: Model, sizes: Sizes) -> np.ndarray:
    return np.random.default_rng(0).integers(model.config.vocab_size, size=(max(sizes.batches), max(*sizes.contexts, *sizes.long)))


def long_row(model: Model, tokens: np.ndarray, budget: int | None) -> dict:
    """Reading a long context, once, after compiling: seconds, the process's peak so far, and the cache's bytes against what its entries take."""
    config = model.config
    if budget is not None:  # a short text compiles all; the full cache's programs are those of its length, so that the compiler's seconds are in its own
        read(model, tokens[:, : 2 * (budget + CHUNK)], budget)
    start = time.perf_counter()
    done = read(model, tokens, budget)
    seconds = time.perf_counter() - start
    entry = config.head_dim * 2 * model.params["embed"].dtype.itemsize + 8  # keys, values; position and score
    return {
        "what": f"read {tokens.shape[1]} tokens with " + ("the full cache" if budget is None else f"budget {budget}"),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "cache_bytes": done.stats(0).allocated_bytes,
        "formula_bytes": config.streams * (tokens.shape[1] if budget is None else budget + done.width) * entry,
    }


def prefill_rows(model: Model, sizes: Sizes, theirs: "Theirs | None", tokens: np.ndarray) -> Iterator[dict]:
    runs = {"full cache": lambda: lambda: read(model, tokens, None).logits, "budget": lambda: lambda: read(model, tokens, sizes.budget).logits}
    if theirs:
        runs["transformers"] = lambda: lambda: theirs.read(tokens)[0]
    yield from compared("read", tokens, tokens.size, take_turns(runs, rounds=1))


def decode_rows(model: Model, sizes: Sizes, theirs: "Theirs | None", tokens: np.ndarray) -> Iterator[dict]:
    """Decoding after a context. "entries alone": as many entries as under the budget, without gates or eviction."""
    (batch, context), steps = tokens.shape, sizes.new_tokens

    def decoding(rows: Rows) -> Callable[[], Callable]:
        def prepare():
            fork = rows.fork()
            jax.block_until_ready(fork.cache)  # or the copying would be timed with the first token
            return lambda: (list(fork.decode(steps, 0.0, 1.0, 0, ())), fork.cache)

        return prepare

    caches = {"full cache": read(model, tokens, None), "budget": read(model, tokens, sizes.budget)}
    caches["entries alone"] = read(model, tokens[:, : sizes.budget + caches["budget"].width // 2 - steps // 2], None)
    runs = {name: decoding(rows) for name, rows in caches.items()}
    if theirs:
        state = theirs.read(tokens)
        runs["transformers"] = lambda: functools.partial(theirs.decode, *copy.deepcopy(state), context, steps)
        if batch == 1 and importlib.util.find_spec("kvpress"):
            press = theirs.press(context, sizes.budget, caches["budget"].width)
            with press(theirs.model):
                pressed = theirs.read(tokens)
            runs["kvpress"] = lambda: functools.partial(theirs.decode, *copy.deepcopy(pressed), context, steps, press)
    yield from compared("decode", tokens, batch * steps, take_turns(runs, rounds=5))


def read(model: Model, tokens: np.ndarray, budget: int | float | None, policy: str = "retention", prefill_chunk: int | None = CHUNK) -> Rows:
    """The rows after reading tokens [B,T], computed."""
    rows = Rows(model, len(tokens), budget, policy, prefill_chunk=prefill_chunk)
    rows.append(tokens.tolist())
    jax.block_until_ready(rows.cache)
    return rows


def compression_rows(model: str, names: Sequence[str], budget: float = 0.25) -> Iterator[dict]:
    """What it costs to read a context and compress it under each policy, each in a process of its own, so that the peak of its memory is its own.

    Retention reads in chunks, the others a context whole, as their papers have it. Raises ValueError, before the first row, for a name that is not known and
    on an accelerator, which one process has to itself and which keeps its peak.
    """
    for name in names:
        policies.get(name)
    if jax.default_backend() != "cpu":
        raise ValueError(f"what compressing costs is measured in processes side by side, which {jax.default_backend()} does not allow; set JAX_PLATFORMS=cpu")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for length, rounds in ((1024, 3), (4096, 1)):
            for policy in names:
                yield processes.submit(compression_row, model, policy, length, budget, rounds).result()


def compression_row(model: str | Model, policy: str, length: int, budget: float, rounds: int) -> dict:
    """What the policy adds to the process at its peak, once everything is compiled; then plain prefill and it by turns."""
    model = checkpoints.load(model) if isinstance(model, str) else model
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, length))
    chunk = CHUNK if policy == "retention" else None
    read(model, tokens, budget, policy, chunk)
    before = forget_peak()
    done = read(model, tokens, budget, policy, chunk)
    peak = peak_memory_bytes() - before
    runs = {"plain": lambda: lambda: read(model, tokens, None).logits, policy: lambda: lambda: read(model, tokens, budget, policy, chunk).logits}
    if policy == "full":
        runs = {policy: runs["plain"]}
    seconds = take_turns(runs, rounds)
    plain = seconds.get("plain", seconds[policy])
    return {
        "what": f"read {length} tokens and compress",
        "policy": policy,
        "prefill": "plain" if policy == "full" else "one-shot" if chunk is None else f"chunks of {chunk}",
        "seconds": statistics.median(seconds[policy]),
        "times_plain": round(statistics.median(one / base for one, base in zip(seconds[policy], plain, strict=True)), 2),
        "peak_bytes": peak,
        "cache_bytes": done.stats(0).allocated_bytes,
    }


def serving_rows(model: Model, bandwidth: float, sizes: Served = Served()) -> Iterator[dict]:
    """Decoding on an accelerator, from small caches to large, so that the peak of each is its own. A cache that does not fit is a row that says so."""
    cells = [(batch, None, context) for batch, context in itertools.product(sizes.batches, sizes.contexts)]
    cells += [(batch, budget, max(sizes.contexts)) for batch, budget in itertools.product(sizes.batches, sizes.budgets)]
    for batch, budget, context in sorted(cells, key=lambda cell: cell[0] * (cell[1] or cell[2])):
        what = f"decode, B={batch}: " + (f"full cache of {context} tokens" if budget is None else f"budget {budget}, any context")
        if compiled.step_bytes(model.config, model.params, None, batch, context, budget) > memory_limit():
            yield {"what": what, "error": "does not fit"}
            continue
        try:
            yield {"what": what, **serving_row(model, bandwidth, sizes, batch, budget, context)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield {"what": what, "error": "does not fit with what decoding needs beside it"}


def serving_row(model: Model, bandwidth: float, sizes: Served, batch: int, budget: int | None, context: int) -> dict:
    """Tokens a second of all sequences together, the peak of the device's memory (None where it was higher before), and the share reached of what
    `bandwidth`, bytes a second, allows (`compiled.step_bytes`).

    The cache is filled without reading, as what is in it changes no time; under a budget with streams of unequal lengths.
    """
    before = max(device_bytes("peak_bytes_in_use"), default=0)
    rows = filled(model, batch, context, budget, (sizes.rounds + 1) * sizes.new_tokens)
    # Again and again in the same cache: a copy to begin each round from would double it.
    seconds = take_turns({"decode": lambda: lambda: list(rows.decode(sizes.new_tokens, 0.0, 1.0, 0, ()))}, sizes.rounds)["decode"]
    step = statistics.median(seconds) / sizes.new_tokens
    least = compiled.step_bytes(model.config, model.params, model.gates.params if budget else None, batch, context, budget)
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": round(batch / step, 1),
        "of_bandwidth": round(least / bandwidth / step, 3),
        "peak_bytes": peak if (peak := peak_memory_bytes()) > before else None,
        "cache_bytes": rows.stats(0).allocated_bytes * batch,
    }


def filled(model: Model, batch: int, context: int, budget: int | None, new_tokens: int) -> Rows:
    """Rows that seem to have read `context` tokens each, with room for `new_tokens` more."""
    config = model.config
    rows = Rows(model, batch, budget, "full" if budget is None else "retention")
    rows._open([context] * batch)
    rows.seen, rows.warned = np.full(batch, context), True
    if budget is None:
        rows._room(context + new_tokens + 1)
    lengths = np.random.default_rng(0).exponential(size=(batch, config.streams))
    ends = np.floor(np.cumsum(lengths, axis=1) / lengths.sum(axis=1, keepdims=True) * config.streams * (budget or 0)).astype(np.int32)
    noise = jax.random.normal(jax.random.key(0), (256, config.head_dim))

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(cache, starts):
        def some(array):
            values = noise if array.ndim > 2 else noise[:, 0]
            axis = array.ndim - values.ndim
            return jnp.broadcast_to(values[jnp.arange(array.shape[axis]) % 256], array.shape).astype(array.dtype)

        slots, width = cache.position.shape[1], cache.buffer_position.shape[1]
        return cache._replace(
            keys=some(cache.keys), values=some(cache.values), stat=-jnp.exp(some(cache.stat)), starts=starts,
            position=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32) % context, cache.position.shape),
            buffer_keys=some(cache.buffer_keys), buffer_values=some(cache.buffer_values),
            buffer_position=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), cache.buffer_position.shape),
            buffered=jnp.full(batch, context if budget is None else 0, jnp.int32), seen=jnp.full(batch, context, jnp.int32),
        )  # fmt: skip

    rows.cache = fill(rows.cache, jnp.pad(jnp.asarray(ends), ((0, 0), (1, 0))))
    return rows


def memory_limit() -> int:
    """Bytes that a device may hold; where devices do not say (CPU), those of the machine."""
    if limits := device_bytes("bytes_limit"):
        return min(limits)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compared(what: str, tokens: np.ndarray, counted: int, seconds: Mapping[str, list[float]]) -> Iterator[dict]:
    """A row for each: tokens a second, and how many times as fast as the full cache (the median of the rounds' ratios)."""
    for name, own in seconds.items():
        yield {
            "what": f"{what}, {tokens.shape[1]} tokens of context, B={len(tokens)}: {name}",
            "seconds": statistics.median(own),
            "tokens_per_second": round(counted / statistics.median(own), 1),
            "times_full_cache": round(statistics.median(full / one for full, one in zip(seconds["full cache"], own, strict=True)), 3),
        }


class Theirs:
    """The same weights in transformers (torch, sdpa), and kvpress around them."""

    def __init__(self, path: pathlib.Path):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa").eval()

    def read(self, tokens: np.ndarray):
        """The next tokens [B,1] and the cache."""
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor(tokens), use_cache=True, logits_to_keep=1)
            return out.logits[:, -1:].argmax(-1), out.past_key_values

    def decode(self, token, cache, position: int, steps: int, press=None) -> None:
        """Greedy decoding; the model's own loop, without the bookkeeping of `generate`."""
        if press is not None:
            with press(self.model):
                return self.decode(token, cache, position, steps)
        with self.torch.inference_mode():
            for step in range(steps):
                at = self.torch.tensor([position + step])
                out = self.model(token, past_key_values=cache, use_cache=True, position_ids=at[None], cache_position=at)
                token = out.logits[:, -1:].argmax(-1)

    def press(self, context: int, budget: int, interval: int):
        """What keeps `budget` tokens per stream of the context, and of what is decoded after each `interval` tokens; its cheapest scores."""
        import kvpress

        decoding = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=interval, target_size=budget, hidden_states_buffer_size=0)
        return kvpress.PrefillDecodingPress(kvpress.KnormPress(compression_ratio=1 - budget / context), decoding)
