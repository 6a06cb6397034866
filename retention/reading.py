"""One reading of full contexts that serves many policies and budgets, as their papers have it: read whole, then compressed once."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp

from retention import observations, policies, programs
from retention.model import Model
from retention.rows import Rows


def stat_of(policy: policies.Policy) -> tuple:
    """Policies that have this in common store the same number with an entry."""
    return policy.stat, policy.gated, policy.hidden, policy.past, policy.entropy


@functools.cache
def reader(members: tuple[policies.Policy, ...]) -> policies.Policy:
    """A policy that never evicts, for which all is noted that these declare. Raises ValueError if their moments are of different positions."""
    moments = {policy.moments for policy in members if policy.moments is not None}
    if len(moments) > 1:
        raise ValueError(f"policies that need the queries' moments from positions {sorted(moments)} on cannot share a reading; give each a run of its own")
    asking = [policy.hidden for policy in members if policy.hidden is not None]
    return policies.Policy(
        score=None,
        gated=any(policy.gated for policy in members),
        queries=max((policy.queries for policy in members), default=0),
        moments=max(moments, default=None),
        hidden=(lambda layers: tuple(sorted({block for hidden in asking for block in hidden(layers)}))) if asking else None,
        past=max((policy.past for policy in members), default=0),
        entropy=any(policy.entropy for policy in members),
        attended=any(policy.attended for policy in members),
    )


class Reading:
    """The full cache of B prompts (token ids), read once, and all that these policies need to compress it.

    Raises ValueError as `reader` does, and for a policy that is not known or needs gates that the model has not.
    """

    def __init__(self, model: Model, names: Sequence[str], prompts: Sequence[Sequence[int]]):
        members = [policies.get(name) for name in names]
        beside = {stat_of(policy): policy for policy in members}
        self.prompts, self.full = prompts, Rows(model, len(prompts), None)
        self.full._follow(reader(tuple(members)), "global", 0, 0)
        self.full.plan = dataclasses.replace(self.full.plan, beside=tuple(beside.values()))
        stats = self.full.append(prompts)
        width = self.full.cache.buffer_position.shape[1]
        self.stats = {name: jnp.pad(stat, [(0, 0)] * 3 + [(0, width - stat.shape[3])]) for name, stat in zip(beside, stats, strict=True)}
        self.names = tuple(names)
        self.read: dict[tuple, Rows] = {}  # by policy and, where it reads twice, sinks

    def read_for(self, policy: str, sinks: int | None = None) -> Rows:
        """The full cache with what this policy stores with each entry. KVzip reads the prompts once more for it, the first time that it is asked for, and
        looks at the first `sinks` tokens too; None: as many as its own.

        Raises ValueError for a policy that was not named.
        """
        if policy not in self.names:
            raise ValueError(f"these prompts were read for {', '.join(self.names)}, not for {policy}; name it to Reading")
        named = policies.get(policy)
        sinks = (named.sinks or 0) if sinks is None else sinks
        key = (policy, sinks if named.reread else None)
        if key not in self.read:
            rows = copy.copy(self.full)
            rows._follow(named, "global", sinks, 0)
            stat = self.stats[stat_of(named)]
            rows.cache = rows.cache._replace(
                buffer_stat=stat + rows.cache.buffer_stat if named.attended else stat,
                noted=observations.noted_for(rows.model.config, named, self.full.plan.policy, rows.cache.noted),
            )
            if named.reread:
                rows._reread(self.prompts)
            self.read[key] = rows
        return self.read[key]

    def compress(
        self, budget: int | float, policy: str, scope: str | None = None, sinks: int | None = None, window: int | None = None, prefill_chunk: int = 256
    ) -> Rows:
        """What one-shot prefill under this policy would have left. Arguments as in `generate`. Raises ValueError as `read_for`."""
        full, rows = self.read_for(policy, sinks), Rows(self.full.model, self.full.batch, budget, policy, scope, prefill_chunk, sinks, window)
        if not rows.evicts:
            return full.fork()
        rows._open([int(seen) for seen in full.cache.seen])
        rows.logits, rows.warned = full.logits, True
        rows.seen = full.seen
        rows._expect(full.most_seen)
        rows.cache = programs.compress(rows.plan, rows.cache, full.cache)
        return rows
