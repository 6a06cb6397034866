"""Learned KV-cache eviction: every cached entry carries a retention score, and the entries of all layers and heads compete for one budget.

Axes, everywhere: B batch, L layers, H kv heads, G query heads per kv head, D head dim, E model dim, T tokens, S = L*H streams (one stream = one kv
head of one layer), M budget per stream on average, C = S*M slots per sequence, W write buffer (tokens between evictions), V vocabulary.
"""

from retention import policies
from retention.checkpoints import load
from retention.generation import Generation, Session, generate

__all__ = ["Generation", "Session", "generate", "load", "policies"]
