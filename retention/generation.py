"""What a user calls: `generate` runs a batch of prompts, `Session` is one conversation, both under a budget."""

import copy
import dataclasses
import fractions
import numbers
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from retention import cache as cache_lib
from retention import policies
from retention.checkpoints import arrays, caches
from retention.model import Model
from retention.names import check_seed, is_whole
from retention.rows import Rows, Stats


@dataclasses.dataclass(frozen=True)
class Generation:
    """text without special tokens; tokens as generated, a stop token included; stats at the end."""

    text: str
    tokens: list[int]
    stats: Stats


def check_sampling(max_new_tokens, temperature, top_p, seed) -> None:
    if not is_whole(max_new_tokens, 1):
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature!r}")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    check_seed(seed)


def check_text(model: Model, text: str, name: str) -> None:
    """Raises ValueError for what is no text, an empty one, and a model that takes none."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it takes no text: put a tokenizer.json into its folder")
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text (str), got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character (a lone surrogate) at {error.start}; take it out") from None
    if not text:
        raise ValueError(f"{name} is empty; give at least one character")


def check_tokens(tokens: Sequence[int], name: str) -> None:
    """Raises ValueError for a text of which the tokenizer makes nothing: there would be no prediction to go on from."""
    if not tokens:
        raise ValueError(f"{name} holds no character that the model's tokenizer knows; give another text")


def generate(
    model: Model,
    prompts: Sequence[str],
    budget: int | float | None = 256,
    policy: str | policies.Policy = "retention",
    scope: str | None = None,
    max_new_tokens: int = 64,
    prefill_chunk: int | None = 256,
    sinks: int | None = None,
    window: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    chat: bool = False,
) -> list[Generation]:
    """Continues a batch of prompts of any lengths, each under its own budget.

    Args:
      prompts: texts, raw unless `chat`, which puts each into the model's chat template as a user's turn, without the names of special tokens in it.
      budget: M, tokens per stream on average (int); a fraction in (0, 1] of each prompt's tokens, and one at least (float); None: the full cache. As
        many tokens as the model was trained for, or more, are the full cache too.
      policy: a name of retention.policies.names(), options behind a colon ("retention:floor=16"), or a Policy; "full" never evicts.
      scope: what competes for the budget, "global", "layer", "head" or "shared"; None: the policy's own, which of
        retention is "global", with local gates "head".
      prefill_chunk: tokens between evictions, in prefill and in decoding (there from 16 on rounded down to a multiple of 16); None: one-shot
        prefill, then one eviction.
      sinks, window: protected first and newest positions; None: the policy's own.
      temperature: 0 is greedy. top_p: sampling keeps the fewest tokens that hold this probability, and what ties with the last. seed: of the samples,
        which differ by place in the batch and by position too.

    Returns:
      One Generation for each prompt.

    Raises:
      ValueError: an argument that cannot work, by name.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable) or not (prompts := list(prompts)):
        raise ValueError("prompts must be a list of at least one text")
    check_sampling(max_new_tokens, temperature, top_p, seed)
    rows = Rows(model, len(prompts), budget, policy, scope, prefill_chunk, sinks, window)
    for i, prompt in enumerate(prompts):
        check_text(model, prompt, f"prompts[{i}]")
    encoded = [model.tokenizer.encode(model.tokenizer.opening(prompt) if chat else prompt) for prompt in prompts]
    for i, own in enumerate(encoded):
        check_tokens(own, f"prompts[{i}]")
    rows.append(encoded)
    tokens = rows.decode_all(max_new_tokens, temperature, top_p, seed, model.tokenizer.eos_ids)
    return [Generation(model.tokenizer.decode(row), row, rows.stats(i)) for i, row in enumerate(tokens)]


def fingerprint(rows: Rows) -> dict[str, str]:
    """What a cache depends on beside its arguments: the model's shape, dtype and weights and, where the policy asks for them, its gates."""
    model = rows.model
    shape = {"shape": repr(model.config), "dtype": str(model.params["embed"].dtype), "weights": arrays.fingerprint(model.params)}
    return shape if rows.gates is None else {**shape, "gates": arrays.fingerprint(rows.gates), "gate config": repr(rows.plan.gate)}


class Session:
    """One conversation under a budget: the cache is carried over turns. Arguments as in `generate`; a fraction is of the first append's tokens.

    The first turn with `chat` begins a conversation in the chat template, the later ones go on with it; an answer that was cut off is closed first.
    Names of special tokens in a turn's text are left out: it cannot end its turn.
    """

    def __init__(
        self,
        model: Model,
        budget: int | float | None = 256,
        policy: str | policies.Policy = "retention",
        scope: str | None = None,
        prefill_chunk: int | None = 256,
        sinks: int | None = None,
        window: int | None = None,
    ):
        self._rows = Rows(model, 1, budget, policy, scope, prefill_chunk, sinks, window)
        self._chatting = self._open = False  # whether a conversation has begun, and whether its last answer is not closed yet
        budget = float(budget) if isinstance(budget, fractions.Fraction) else budget
        self._arguments = dict(budget=budget, policy=policy, scope=scope, prefill_chunk=prefill_chunk, sinks=sinks, window=window)

    def append(self, text: str, chat: bool = False) -> None:
        """Prefills `text` (as a user's turn of the chat template with `chat`) and ends with a selection: at most S*M entries are kept.

        Broken off midway, by an error or Ctrl-C, it leaves a session that raises ValueError: what its cache holds is unknown. A fork made before goes on.
        """
        model = self._rows.model
        check_text(model, text, "text")
        if chat:
            text = model.tokenizer.following(text, self._open) if self._chatting else model.tokenizer.opening(text)
        first = self._rows.cache is None
        tokens, start = model.tokenizer.encode(text, bos=first), model.tokenizer.encode("")
        if not first and tokens[: len(start)] == start:  # what begins a text stands once, also where the template writes it
            tokens = tokens[len(start) :]
        check_tokens(tokens, "text")
        self._rows.append([tokens])
        if chat:
            self._chatting = self._open = True

    def stream(
        self, text: str = "", max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, chat: bool = False
    ) -> Iterator[str]:
        """Appends `text`, if any, and yields the continuation in pieces as it is decoded. Returns the Generation (the generator's return value).

        `text` competes for the budget before it is answered, as in `append`: a policy that protects no window may drop much of a
        question first. Retention answers as well either way (experiments/LOG.md, 2026-11-30).
        Abandoned between two pieces, the session goes on from the last one; broken off inside one (Ctrl-C), it is used no more: see `append`.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        if text:
            self.append(text, chat)
        elif self._rows.cache is None:
            raise ValueError("text is empty and nothing was appended before; give a text to continue")
        tokenizer = self._rows.model.tokenizer
        decoder, tokens, written = tokenizer.stream_decoder(), [], []
        for piece in self._rows.decode(max_new_tokens, temperature, top_p, seed, tokenizer.eos_ids):
            new = [int(token) for token in piece[0] if token >= 0]
            tokens += new
            written.append("".join(decoder.push(token) for token in new))
            self._open = tokens[-1] not in tokenizer.eos_ids
            yield written[-1]
        written.append(decoder.finish())
        yield written[-1]
        return Generation("".join(written), tokens, self.stats)

    def generate(self, text: str = "", max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, chat: bool = False) -> Generation:
        """Appends `text`, if any, and continues, until a stop token or max_new_tokens."""
        pieces = self.stream(text, max_new_tokens, temperature, top_p, seed, chat)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def fork(self) -> "Session":
        """A session with a copy of this one's cache: several questions can be asked of one context."""
        other = copy.copy(self)
        other._rows = self._rows.fork()
        return other

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the session to a safetensors file, whole or not at all: its cache, as large as the budget, and what `restore` needs to go on with it.

        Between two pieces of a `stream` it ends with a selection first, as a turn does; save a fork, and what is streamed is as it would have been.
        Raises ValueError if nothing was appended yet, or if the policy is not a registered name: a file cannot hold a function. And as `arrays.save`.
        """
        rows, arguments = self._rows, {name: x.item() if isinstance(x, np.generic) else x for name, x in self._arguments.items()}
        arguments["scope"] = rows.plan.scope
        if rows.cache is None:
            raise ValueError("nothing was appended to this session, so there is nothing to save; append a text first")
        if not isinstance(arguments["policy"], str):
            raise ValueError("policy must be a registered name for a session to be saved; register this Policy and give the session its name")
        turns = {"chatting": self._chatting, "open": self._open}
        caches.save(path, *rows.state(), {"arguments": arguments, "model": fingerprint(rows), "policy": rows.plan.policy.declared(), "turns": turns})

    @classmethod
    def restore(cls, model: Model, path: str | pathlib.Path) -> "Session":
        """The session that `save` wrote, to go on as if it had never left; `model` as it was then.

        Raises:
          FileNotFoundError: no such file. ValueError: not a session's file, or a damaged one; another model, dtype or gates; a policy that is not
          registered here, or another under its name, as far as what it declares tells: its functions are not in the file.
        """
        cache, logits, facts = caches.load(path, ("arguments", "model", "policy", "turns"), "session file", "Session.save")
        session = cls(model, **facts["arguments"])
        rows = session._rows
        for name, fact in fingerprint(rows).items():
            if facts["model"].get(name) != fact:
                raise ValueError(f"the session in {path} is of another model, which differs in its {name}; load the model and gates that it was saved with")
        for name, declared in rows.plan.policy.declared().items():
            if facts["policy"].get(name) != declared:
                what = f"the policy {facts['arguments']['policy']!r} is not the one of the session in {path}: its {name} was {facts['policy'].get(name)}"
                raise ValueError(f"{what} and is {declared}; register the policy that it was saved with")
        rows.resume(cache, logits)
        session._chatting, session._open = facts["turns"]["chatting"], facts["turns"]["open"]
        return session

    def kept(self) -> list[list[np.ndarray]]:
        """[layer][head] int arrays: the true positions kept, in order."""
        config = self._rows.model.config
        self._rows.check_whole()
        if self._rows.cache is None:
            return [[np.zeros(0, np.int32) for _ in range(config.kv_heads)] for _ in range(config.layers)]
        return cache_lib.kept_positions(self._rows.cache, 0)

    @property
    def stats(self) -> Stats:
        return self._rows.stats(0)
