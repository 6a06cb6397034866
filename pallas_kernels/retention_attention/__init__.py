"""Training attention with learned forgetting, its gradient, and the retained mass in one pass, with no T x T array (arXiv 2605.09649, 2512.03324)."""

import jax

from pallas_kernels.platforms import choose
from pallas_kernels.retention_attention import gpu, reference, tpu, xla

_IMPLEMENTATIONS = {
    "reference": reference.retention_attention,
    "cpu": xla.retention_attention,
    "tpu": tpu.retention_attention,
    "gpu": gpu.retention_attention,
}


def retention_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    start: jax.Array | int | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """out_t = sum_i softmax_i(q_t.k_i / sqrt(D) + (t-i) log beta_i) v_i and S_t = sum_i beta_i^(t-i), over i <= t in t's document.

    Differentiable once, in reverse, by q, k, v and log_beta. Kept for that: inputs, out, and one float32 a query. Logits, bias and sums are float32.
    The queries may be a slice of the sequence, as where each device has some of them and gathers all keys: gradients of slices add up.

    Args:
      q: [B,Tq,H,G,D] float32 or bfloat16, G query heads for each of H kv heads. k, v: [B,T,H,D] of q's dtype.
      log_beta: [B,T,H] float32, finite and <= 0: how fast token i is forgotten by kv head h. None is 0 everywhere, plain causal attention, for less.
      segment_ids: [B,T] integers; a document is a maximal run of equal ids. None: each row is one document.
      start: integer, which may be traced: query n stands at t = start + n, and start + Tq <= T. None: Tq is T, and start 0.
      implementation: "reference" (Tq x T, for tests), "cpu" (xla.py), "tpu" or "gpu"; None: the platform's own.

    Returns:
      out [B,Tq,H,G,D] in q's dtype, and the retained mass S [B,Tq,H] float32.

    Raises ValueError for any other shape, dtype, value (where values are concrete) or implementation.
    """
    reference.check(q, k, v, log_beta, segment_ids, start)
    implementation = choose(implementation, _IMPLEMENTATIONS)
    return _IMPLEMENTATIONS[implementation](q, k, v, log_beta, segment_ids, start)
