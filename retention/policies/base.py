"""What a policy is: the number it stores with each cache entry, how it ranks entries, and what it needs the model to tell it for that."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retention.cache import SCOPES
from retention.names import check_name, is_whole


class Written(NamedTuple):
    """T new tokens of all layers, as they are written into the cache. What the policy has not declared is None."""

    position: jax.Array  # [B, T] int32
    stream: jax.Array  # [L, 1, 1, H] int32, the stream's number
    keys: jax.Array  # [L, B, T, H, D] after RoPE
    log_beta: jax.Array | None  # [L, B, T, H] float32 (gated)
    hidden: jax.Array | None  # [n, B, P+T, E], outputs of the n blocks `hidden`; of the P tokens before too (past)
    entropy: jax.Array | None  # [B, T] float32, of the prediction that each token followed, in nats (entropy)


class Streams(NamedTuple):
    """One layer's entries, each stream dense and in time order, and what was noted of the tokens seen. What the policy has not declared is None.

    N entries, of which those that are not live are zeros. A query position below 0 is no query.
    """

    stat: jax.Array  # [B, H, N] float32
    position: jax.Array  # [B, H, N] int32
    live: jax.Array  # [B, H, N] bool
    keys: jax.Array  # [B, H, N, D] after RoPE
    values: jax.Array  # [B, H, N, D]
    seen: jax.Array  # [B] int32
    sinks: int  # first positions that are protected
    window: jax.Array  # [B] int32, newest positions that are protected
    budget: jax.Array  # [B] int32
    frequency: jax.Array  # [D/2] float32, of RoPE
    queries: jax.Array | None  # [B, Q, H, G, D] after RoPE, of the newest Q tokens (queries)
    query_position: jax.Array | None  # [B, Q] int32
    query_mean: jax.Array | None  # [B, H, G, D] float32, before RoPE (moments)
    query_covariance: jax.Array | None  # [B, H, G, D, D] float32


# Of a policy that ranks each entry by itself: score(stat, position, seen) -> float32 of their common shape. stat is what `stat` stored, position the
# entry's true position, seen the tokens so far, which is the next token's position. Of one that looks at whole streams: score(Streams) -> [B, H, N].
# Entries with higher scores stay; NaN ranks with -inf.
Score = Callable[..., jax.Array]


def check_shape(name: str, array, shape: tuple[int, ...], each: str = "an entry") -> None:
    """Raises ValueError unless what a policy's function `name` has returned is of this shape."""
    if jnp.shape(array) != shape:
        raise ValueError(f"a policy's {name} must return one number {each}, an array of shape {shape}, got {jnp.shape(array)}; jnp.broadcast_to makes it one")


def no_stat(written: Written) -> jax.Array:
    """For policies that store nothing."""
    layers, *_, heads = written.stream.shape
    return jnp.zeros((layers, *written.position.shape, heads), jnp.float32)


def as_stored(stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
    """The score of policies that know an entry's worth when it is written."""
    return stat


@dataclasses.dataclass(frozen=True)
class Policy:
    """A ranking of cache entries.

    score: see `Score`; None never evicts. stat(Written) -> [L,B,T,H] float32: the number stored with each entry when it is written.
    streams: score looks at whole streams. sinks, window: the first and newest positions protected by default (sinks None: as many as the gates were
    trained with); window may be a function of the budget M, a number or an array [B]. floor: entries every stream keeps whatever the others score (scope
    global). lowest: entries that are not protected and score below it go even where there is room. scope: what competes for what unless the user says
    otherwise, one of `scopes`. layer_budgets(budget [B], seen [B], L, sinks + window) -> [B, L] int32: what stands for M in each layer (scope head), M
    on average, at most 2M and no less than is protected; None: M.

    What the model is asked for, and computes for no other policy: gated: log beta, and so gates. queries: those of this many newest tokens. moments:
    mean and covariance of the queries from this position on. hidden(L): the blocks whose outputs `stat` sees, past: of so many tokens before the new
    ones too. entropy: of the predictions. attended: the attention that an entry receives, mean over its query heads, is added to its stat at every
    step. reread: before an eviction the new tokens are read once more, and the most attention that an entry then receives from a query becomes its stat;
    the number is how many are read at once.
    """

    score: Score | None
    stat: Callable[[Written], jax.Array] = no_stat
    streams: bool = False
    sinks: int | None = 0
    window: int | Callable = 0
    floor: int = 0
    lowest: float = -math.inf
    scope: str = "global"
    scopes: tuple[str, ...] = SCOPES
    layer_budgets: Callable | None = None
    gated: bool = False
    queries: int = 0
    moments: int | None = None
    hidden: Callable[[int], tuple[int, ...]] | None = None
    past: int = 0
    entropy: bool = False
    attended: bool = False
    reread: int = 0

    def __post_init__(self):
        """Raises ValueError for what no cache could do."""
        for name in ("sinks", "window", "floor", "queries", "moments", "past", "reread"):
            value = getattr(self, name)
            if not (is_whole(value) or (name in ("sinks", "moments") and value is None) or (name == "window" and callable(value))):
                raise ValueError(f"a policy's {name} must be a whole number of tokens, 0 or more, got {value!r}")
        for name in ("score", "stat", "hidden", "layer_budgets"):
            value = getattr(self, name)
            if not (callable(value) or (name != "stat" and value is None)):
                raise ValueError(f"a policy's {name} must be a function{'' if name == 'stat' else ' or None'}, got {value!r}")
        if not isinstance(self.scopes, tuple) or self.scope not in self.scopes:
            raise ValueError(f"a policy's scopes must be a tuple that holds its scope, {self.scope!r}, got {self.scopes!r}")
        if not isinstance(self.lowest, numbers.Real) or math.isnan(self.lowest):
            raise ValueError(f"a policy's lowest must be a score, or -inf for none, got {self.lowest!r}")
        if self.past and self.hidden is None:
            raise ValueError(f"a policy's past, {self.past} tokens, is of hidden states: say in hidden of which blocks")
        for scope in self.scopes:
            check_name("scope of a policy", scope, SCOPES)

    def declared(self) -> dict[str, str]:
        """All but its functions, by name, to be told from another policy of the same name."""
        return {field.name: repr(value) for field in dataclasses.fields(self) if not callable(value := getattr(self, field.name))}

    def stat_of(self, written: Written) -> jax.Array:
        """What `stat` gives, [L,B,T,H]. Raises ValueError for another shape, of which the cache would hold a part."""
        stat = self.stat(written)
        check_shape("stat", stat, (written.stream.shape[0], *written.position.shape, written.stream.shape[-1]))
        return stat

    def score_of(self, stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
        """What `score` gives of entries that it ranks each by itself, of stat's shape. Raises ValueError for another."""
        score = self.score(stat, position, seen)
        check_shape("score", score, stat.shape)
        return score

    def layer_budgets_of(self, budget: jax.Array, seen: jax.Array, layers: int, protected: int | jax.Array) -> jax.Array:
        """What `layer_budgets` gives, [B, L]. Raises ValueError for another shape."""
        shares = self.layer_budgets(budget, seen, layers, protected)
        check_shape("layer_budgets", shares, (*budget.shape, layers), "a sequence and layer")
        return shares

    def own_scope(self, gates) -> str:
        """What competes for what under a model's gates (None: it has none) unless the user says otherwise: local ones have no scale in common."""
        return "head" if self.gated and gates is not None and gates.config.kind == "local" else self.scope
