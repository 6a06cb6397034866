"""B sequences that run together, each under its own budget: chunked prefill and decoding over the slot pool.

The host only feeds prompts in and takes generated tokens out, a piece of several at a time; nothing is read back for a single token.
"""

import contextlib
import dataclasses
import functools
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retention import cache as cache_lib
from retention import observations, policies, programs
from retention.cache import Cache
from retention.model import Model
from retention.names import check_name, is_whole
from retention.programs import Plan

CHUNK = 256  # tokens that go through the layers at once, and the write buffer's length where prefill_chunk does not say
PIECE = 16  # tokens decoded between two looks of the host
AHEAD = 512  # tokens to come that there is room for at once, where shapes follow them: each is a program of its own


@dataclasses.dataclass(frozen=True)
class Stats:
    """kept_entries: live entries over all streams. capacity: the most that may stay, S*M, once a turn has ended; while one is streamed the newest tokens
    of all streams are there besides; of a full cache what there is room for at the moment. allocated_bytes: of this sequence's cache arrays.
    seen_tokens: tokens appended and generated."""

    kept_entries: int
    capacity: int
    allocated_bytes: int
    seen_tokens: int


def check_budget(budget, sinks: int, window: int | Callable, floor: int) -> None:
    """Raises ValueError for a budget that is no budget, or too small for what is protected."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget must be a whole number of tokens per stream, a fraction in (0, 1] or None, got {budget!r}")
    if isinstance(budget, numbers.Integral):
        if budget < 1:
            raise ValueError(f"budget must be at least 1 token per stream (or None for the full cache), got {budget}")
    elif not 0 < budget <= 1:
        raise ValueError(f"a fractional budget must be in (0, 1], got {budget}; for tokens per stream give a whole number")
    if isinstance(budget, numbers.Integral):
        check_protected(budget, sinks, window, floor)


def check_protected(budget: int, sinks: int, window: int | Callable, floor: int) -> None:
    window = int(window(budget)) if callable(window) else window
    if budget < sinks + window + floor:
        part = f" + floor = {sinks} + {window} + {floor}" if floor else f" = {sinks} + {window}"
        raise ValueError(f"budget {budget} is smaller than sinks + window{part}, which are always kept; raise it or protect fewer")


def roomy(tokens: int) -> int:
    """tokens, rounded up by at most 1/16: sizes that follow the data then share compilations."""
    step = max(1, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


class Rows:
    """B sequences that run together, each under its own budget. What `Session` and `generate` share.

    Between calls the write buffer is empty, but for prompts that wait for their answer; where nothing is ever evicted it is the full cache.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        budget: int | float | None,
        policy: str | policies.Policy = "retention",
        scope: str | None = None,
        prefill_chunk: int | None = 256,
        sinks: int | None = None,
        window: int | None = None,
    ):
        if not isinstance(model, Model):
            raise ValueError(f"model must be what retention.load returns, got {model!r}")
        policy = policies.get(policy) if isinstance(policy, str) else policy
        if not isinstance(policy, policies.Policy):
            raise ValueError(f"policy must be one of {', '.join(policies.names())}, or a Policy, got {policy!r}")
        trained = model.gates
        scope = policy.own_scope(trained) if scope is None else scope
        check_name("scope", scope, cache_lib.SCOPES)
        if scope not in policy.scopes:
            raise ValueError(f"this policy makes no sense under scope={scope!r}; its scope may be {' or '.join(policy.scopes)}")
        for name, value in (("sinks", sinks), ("window", window)):
            if value is not None and not is_whole(value):
                raise ValueError(f"{name} must be a whole number of tokens, 0 or more, or None for the policy's own, got {value!r}")
        if prefill_chunk is not None and not is_whole(prefill_chunk, 1):
            raise ValueError(f"prefill_chunk must be at least 1 token, or None for one-shot prefill, got {prefill_chunk!r}")
        if sinks is None:
            sinks = policy.sinks
            if sinks is None:
                sinks = trained.config.sinks if trained else 0
        window = policy.window if window is None else int(window)
        check_budget(budget, sinks, window, policy.floor)
        if policy.floor and scope != "global":
            raise ValueError(f"a policy with a floor needs scope='global', got scope={scope!r}; the other scopes fix each share already")
        if policy.layer_budgets and scope != "head":
            raise ValueError(f"a policy with layer_budgets needs scope='head', got scope={scope!r}; in the others layers compete or share alike")
        bounded = policy.lowest > -np.inf
        if policy.floor and bounded:
            raise ValueError("a policy has a floor, which keeps entries whatever they score, or a lowest score (alpha), below which they go; not both")
        if bounded and budget is None:
            raise ValueError("a policy with a lowest score (alpha) needs a budget, the most that it may keep, got budget=None")
        # As many tokens as the model can use are the full cache.
        whole = isinstance(budget, numbers.Integral) and budget >= model.config.max_positions and not bounded
        if budget is not None:
            budget = int(budget) if isinstance(budget, numbers.Integral) else float(budget)
        self.asked = budget if whole and policy.score is not None else None  # a budget that is the full cache
        self.budget = None if policy.score is None or whole else budget
        if self.budget is None:
            policy = policies.get("full")
        self.model, self.batch = model, batch
        self._follow(policy, scope, int(sinks), window)
        self.one_shot = prefill_chunk is None
        self.width = prefill_chunk or CHUNK
        self.piece = min(PIECE, self.width)
        self.cache: Cache | None = None
        self.logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
        # Of each sequence, as the host counts them, so that it is alone what it is in company: tokens in all, those in the write buffer and how many may be.
        self.seen, self.buffered, self.limit = np.zeros(batch, np.int64), np.zeros(batch, np.int64), np.full(batch, self.width)
        self.unread: list[list[int]] = [[]] * batch  # of a policy that rereads: a question that waits for its answer, and the answer so far
        self.warned = False
        self.settled = True  # the write buffer is empty, or the full cache
        self.whole = True  # nothing was broken off midway

    def _follow(self, policy: policies.Policy, scope: str, sinks: int, window: int | Callable) -> None:
        trained = self.model.gates
        if policy.gated and trained is None:
            raise ValueError("this policy ranks by learned gates and the model has none: load it with gates='shipped' or the path of trained gates")
        if policy.hidden:
            layers = self.model.config.layers
            blocks = policy.hidden(layers)
            if not isinstance(blocks, Sequence) or not blocks or not all(is_whole(block) and block < layers for block in blocks):  # XLA would take another
                raise ValueError(f"this policy's hidden asks for the outputs of blocks {blocks}; the model's are 0 to {layers - 1}")
        self.window = window
        self.plan = Plan(self.model.config, trained.config if policy.gated else None, policy, scope, sinks, None if callable(window) else window)
        self.gates = trained.params if policy.gated else None

    @property
    def evicts(self) -> bool:
        return self.budget is not None

    @property
    def most_seen(self) -> int:
        return int(self.seen.max())

    def budgets(self, lengths: Sequence[int]) -> list[int]:
        """Tokens per stream of each sequence, whose first prompt has `lengths` tokens; a fraction is one of them, and at least one token.

        Zeros where nothing is evicted. Raises ValueError for a fraction that is smaller than what is always kept.
        """
        if not self.evicts:
            return [0] * len(lengths)
        if isinstance(self.budget, numbers.Integral):
            return [int(self.budget)] * len(lengths)
        budgets = [max(1, int(self.budget * length + 1e-6)) for length in lengths]  # 0.29 * 100 is 28.999999999999996
        for budget in budgets:
            check_protected(budget, self.plan.sinks, self.window, self.plan.policy.floor)
        return budgets

    def _open(self, lengths: Sequence[int]) -> None:
        """The cache, once the first prompts' lengths are known."""
        config, budgets = self.model.config, self.budgets(lengths)
        if self.plan.policy.layer_budgets:
            self._check_layers(budgets, lengths)
        slots = config.streams * (max(budgets) if isinstance(self.budget, numbers.Integral) else roomy(max(budgets)))
        dtype = self.model.params["embed"].dtype
        self.cache = cache_lib.init(
            config.layers, config.kv_heads, config.head_dim, budgets, slots, self.width, dtype,
            observations.nothing_noted(config, self.plan.policy, self.batch, dtype),
        )  # fmt: skip

    def _check_layers(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Raises ValueError where layers get what the pool has not, or less than is protected in them: others' entries would go, whatever they score."""
        layers, budget, seen = self.model.config.layers, jnp.asarray(budgets, jnp.int32), jnp.asarray(lengths, jnp.int32)
        protected = self.plan.sinks + (self.window(budget) if callable(self.window) else self.window)
        shares = np.asarray(self.plan.policy.layer_budgets_of(budget, seen, layers, protected))
        least = np.broadcast_to(np.minimum(budget, protected), budget.shape)
        for own, mean, low in zip(shares, budgets, least, strict=True):
            if own.sum() != layers * mean or own.min() < low or own.max() > 2 * mean:
                raise ValueError(f"a policy's layer_budgets must be {mean} on average, here {low} at least and {2 * mean} at most, got {own.tolist()}")

    def _room(self, tokens: int) -> None:
        """Makes the write buffer long enough for `tokens`; if it has grown before, by a chunk at least, as turns may be short."""
        width = self.cache.buffer_position.shape[1]
        if tokens > width:
            self.cache = cache_lib.with_buffer(self.cache, roomy(tokens if width == self.width else max(tokens, width + CHUNK)))

    def _saw(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Counts each sequence's new tokens."""
        self.seen = self.seen + np.asarray(tokens)

    def _expect(self, seen: int) -> None:
        """Lets a policy that looks at streams see all that they can hold of `seen` tokens."""
        policy = self.plan.policy
        if self.evicts and (policy.streams or policy.attended):
            slots, config = self.cache.position.shape[1], self.model.config
            share = slots // config.streams
            # A stream may hold its share, its layer's, or, competing with all, everything that it has seen.
            longest = {"head": share, "shared": share, "layer": config.kv_heads * share, "global": min(slots, roomy(seen))}[self.plan.scope]
            longest = min(slots, 2 * longest) if policy.layer_budgets else longest
            # Never less than before: a stream that was left between two pieces and goes on behind a turn has been promised its room.
            self.plan = dataclasses.replace(self.plan, longest=max(self.plan.longest, longest))

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Around all that changes the rows: what is broken off inside, by an error or Ctrl-C, leaves a cache that matches no text."""
        self.check_whole()
        self.whole = False
        yield
        self.whole = True
        trained_for = self.model.config.max_positions
        if self.most_seen > trained_for and not self.warned:
            self.warned = True
            unbounded = f", and a budget of {self.asked}, which is no smaller, evicts none of them" if self.asked and not self.evicts else ""
            warnings.warn(f"{self.most_seen} tokens are beyond the {trained_for} that this model was trained for{unbounded}; answers may degrade", stacklevel=5)

    def check_whole(self) -> None:
        """Raises ValueError if something was broken off."""
        if not self.whole:
            raise ValueError("reading or generating was broken off midway here, so that the cache matches no text; begin anew, or go on from a fork or a file")

    def _evict(self) -> None:
        self.cache = programs.evict(self.plan, self.cache)
        self._free()

    def _free(self) -> None:
        """After a selection: the write buffer is empty, and as long as it was."""
        if self.cache.buffer_position.shape[1] > self.width:
            self.cache = cache_lib.with_buffer(self.cache, self.width)
        self.buffered, self.limit = np.zeros(self.batch, np.int64), np.full(self.batch, self.width)

    def settle(self) -> None:
        """Ends a decode, finished or abandoned, with a selection: the buffer is then free for the next tokens."""
        with self._whole():
            if self.evicts and not self.settled:
                self._read_again(np.full(self.batch, True))
                self._evict()
            self.settled = True

    def append(self, prompts: Sequence[Sequence[int]], answer: int | None = None) -> list[jax.Array]:
        """Feeds each sequence its tokens, evicting after each chunk (one-shot: once, at the end).

        With `answer`, so many tokens that will be generated behind them, nothing is evicted: they stay whole in the write buffer, as what is generated does,
        until the answer ends or has more tokens than the buffer. A question is then answered before it competes for the budget.

        Returns the stats [L, B, H, tokens] of the policies of plan.beside. Raises ValueError for ids that the embedding has not, as XLA would clamp them.
        """
        self.settle()
        lengths, rows = [len(prompt) for prompt in prompts], self.model.config.vocab_size
        if (largest := max(max(prompt, default=0) for prompt in prompts)) >= rows:
            raise ValueError(f"the text holds a token of id {largest}, but the model's embedding has {rows} rows; take it out")
        if self.cache is None:
            self._open(lengths)
        with self._whole():
            return self._append(prompts, lengths, answer)

    def _append(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], answer: int | None) -> list[jax.Array]:
        self._saw(lengths)
        self._expect(self.most_seen)
        chunk = CHUNK if self.one_shot or not self.evicts else self.width
        if not self.evicts:
            self._room(self.most_seen + chunk)
        elif answer is not None:
            needed = np.array(lengths) + min(answer, self.width) + self.piece
            self.buffered, self.limit = np.array(lengths), self.width * -(-needed // self.width)
            self._room(int(self.limit.max()))
        elif self.one_shot:
            self._room(max(lengths) + chunk)
        rereads = self.plan.policy.reread > 0
        if rereads and self.evicts and answer is not None:
            self.unread = [list(prompt) for prompt in prompts]
        beside = []
        for begin in range(0, max(lengths), chunk):
            left = max(lengths) - begin
            # The last chunk is cut to the next power of two: a short question should not cost a whole chunk.
            size = min(chunk, max(32, 1 << (left - 1).bit_length()))
            parts = [prompt[begin : begin + size] for prompt in prompts]
            tokens, valid = padded(parts, size)
            evict = self.evicts and answer is None and (left <= size or not self.one_shot)
            self.cache, self.logits, stats = programs.prefill(
                self.plan, self.model.params, self.gates, self.cache, tokens, valid, self.logits, evict=evict and not rereads
            )
            beside.append(stats)
            if evict and rereads:
                self._reread(prompts if self.one_shot else parts)
                self._evict()
        self.settled = answer is None or not self.evicts
        if self.evicts and self.settled:
            self._free()
        return [jnp.concatenate(stats, axis=3) for stats in zip(*beside, strict=True)]

    def score(self, tokens: np.ndarray) -> jax.Array:
        """[B,T,V]: the logits of each of the tokens [B,T], before it was seen. Then they are in the cache, as one chunk of `append`.

        Raises ValueError if T is more than the write buffer holds.
        """
        if tokens.shape[1] > self.width:
            raise ValueError(f"tokens must be at most {self.width} a sequence, the length of the write buffer (prefill_chunk), got {tokens.shape[1]}")
        self.settle()
        rereads = self.plan.policy.reread > 0
        with self._whole():
            self._saw([tokens.shape[1]] * self.batch)
            self._expect(self.most_seen)
            if not self.evicts:
                self._room(self.most_seen + CHUNK)
            self.cache, predicted, self.logits = programs.score(
                self.plan, self.model.params, self.gates, self.cache, jnp.asarray(tokens), self.logits, evict=self.evicts and not rereads
            )
            if rereads:
                self._reread(tokens.tolist())
                self._evict()
        return predicted

    def _reread(self, read: Sequence[Sequence[int]]) -> None:
        """Reads the newest tokens of each sequence, which the buffer ends with, once more, as many at a time as the policy says.

        The chat template's opening is not read again, as in KVzip.
        """
        start = self.cache.buffered - jnp.asarray([len(tokens) for tokens in read], jnp.int32)
        opening = turn(self.model)[0]
        before = np.array([len(opening) if list(tokens[: len(opening)]) == opening else 0 for tokens in read], np.int32)
        read = [tokens[skipped:] for tokens, skipped in zip(read, before, strict=True)]
        chunk = self.plan.policy.reread
        for begin in range(0, max(map(len, read)), chunk):
            parts = [tokens[begin : begin + chunk] for tokens in read]
            asking = [request(self.model, tokens[:begin]) + list(part) if part else [] for tokens, part in zip(read, parts, strict=True)]
            tokens, valid = padded(asking, roomy(max(map(len, asking))))
            first, count = start + before + begin, np.array([len(part) for part in parts], np.int32)
            skipped = start if begin == 0 else first
            stat = programs.reread(self.plan, self.model.params, self.cache, tokens, valid, skipped, first, count)
            self.cache = self.cache._replace(buffer_stat=stat)

    def _read_again(self, due: np.ndarray) -> None:
        """Reads what is unread of the sequences that are `due` [B] for an eviction."""
        read = [own if now else [] for own, now in zip(self.unread, due, strict=True)]
        if any(read):
            self._reread(read)
        self.unread = [[] if now else own for own, now in zip(self.unread, due, strict=True)]

    def fork(self) -> "Rows":
        """The same sequences, to go on by themselves."""
        self.check_whole()
        other = object.__new__(Rows)
        other.__dict__.update(self.__dict__)
        # Programs consume the cache they are given, so the two may not share arrays.
        other.cache = jax.tree.map(jnp.copy, self.cache)
        return other

    def state(self) -> tuple[Cache, jax.Array]:
        """All that what follows depends on, beside the model and the arguments: the cache, its write buffer no longer than what is in it, and the logits."""
        self.settle()
        return cache_lib.with_buffer(self.cache, int(self.cache.buffered.max())), self.logits

    def resume(self, cache: Cache, logits: jax.Array) -> None:
        """Goes on from the `state` of rows of the same model and arguments."""
        self.cache = cache_lib.with_buffer(cache, self.width) if self.evicts else cache
        self.logits, self.seen = logits, np.asarray(cache.seen, np.int64)

    def decode(self, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields [B, piece] tokens at a time, -1 past a sequence's end, until all have ended or have max_new_tokens; then a selection follows.

        Raises ValueError where the logits are no numbers, of which the first token would be taken.
        """
        self.check_whole()
        if not jnp.isfinite(self.logits).all():
            raise ValueError(f"the model's logits are NaN or infinite: its weights are damaged, or beyond {self.cache.keys.dtype}; load it anew")
        done, ended = jnp.zeros(self.batch, bool), np.zeros(self.batch, bool)
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(self.batch))
        stop = jnp.asarray(list(stop) or [-1], jnp.int32)
        expected = 0  # tokens seen, for which there is room
        for begin in range(0, max_new_tokens, self.piece):
            steps = min(self.piece, max_new_tokens - begin)
            with self._whole():
                if self.most_seen + steps > expected:  # also where others have appended meanwhile
                    expected = self.most_seen + min(max_new_tokens - begin, AHEAD)
                    self._expect(expected)
                    if not self.evicts:
                        self._room(expected + 1)
                self.settled = False
                # A sequence that has ended is still written behind its last entry: over it, were there no room.
                full = self.buffered == self.cache.buffer_position.shape[1]
                due = (~ended | full) & (self.buffered + self.piece > self.limit)
                self._read_again(due)
                self.cache, self.logits, done, tokens = programs.decode(
                    self.plan, self.model.apart, self.gates, self.cache, self.logits, done, due, keys, steps, float(temperature), float(top_p), stop,
                    piece=self.piece, evicts=self.evicts,
                )
                tokens, ended = np.asarray(tokens), np.asarray(done)
                fed = (tokens >= 0).sum(axis=1)
                self._saw(fed)
                self.unread = [own and own + row[row >= 0].tolist() for own, row in zip(self.unread, tokens, strict=True)]
                self.buffered, self.limit = np.where(due, 0, self.buffered) + fed, np.where(due, self.width, self.limit)
            yield tokens
            if ended.all():
                break
        self.settle()

    def decode_all(self, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop: Sequence[int]) -> list[list[int]]:
        """The tokens of each sequence, as `decode` yields them, to its end."""
        tokens = np.concatenate(list(self.decode(max_new_tokens, temperature, top_p, seed, stop)), axis=1)
        return [[int(token) for token in row if token >= 0] for row in tokens]

    def stats(self, row: int) -> Stats:
        self.check_whole()
        streams = self.model.config.streams
        if self.cache is None:
            return Stats(0, 0, 0, 0)
        width = self.cache.buffer_position.shape[1]
        capacity = streams * (int(self.cache.budget[row]) if self.evicts else width)
        kept = int(cache_lib.kept_entries(self.cache)[row])
        return Stats(kept, capacity, cache_lib.allocated_bytes(self.cache) // self.batch, int(self.cache.seen[row]))


def padded(rows: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, size] int32 tokens, zeros behind each row's, and [B] int32 how many each has."""
    tokens, valid = np.zeros((len(rows), size), np.int32), np.array([len(row) for row in rows], np.int32)
    for row, own in enumerate(rows):
        tokens[row, : len(own)] = own
    return tokens, valid


def turn(model: Model) -> tuple[list[int], list[int]]:
    """The token ids between which the chat template puts a conversation's first turn. Without a template there are none."""
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return [], []
    opening, closing = tokenizer.turn()
    return tokenizer.encode(opening, bos=True), tokenizer.encode(closing, bos=False)


def request(model: Model, before: Sequence[int]) -> list[int]:
    """What asks the model to repeat the part of the context that follows `before` (KVzip). Without a tokenizer nothing asks."""
    if model.tokenizer is None:
        return []
    text = "\n\nRepeat the part of the previous context exactly, starting with" if before else "\n\nRepeat the previous context exactly."
    return model.tokenizer.encode(text, bos=False) + list(before[-8:]) + turn(model)[1]
