"""The shapes that retention_attention is tested, compiled and timed at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """documents: their lengths in each row, of which the last goes on to the row's end; None: no segment_ids.

    forgetting: what log_beta holds: "mixed" (0, and -1e-6 to -50), "never" (0), "at once" (-50), or None for no log_beta.
    queries: the slice of the sequence that has queries, (begin, end); None: all of it has, and there is no start.
    """

    batch: int
    length: int
    heads: int
    group: int
    dim: int
    dtype: str = "float32"
    documents: tuple[tuple[int, ...], ...] | None = None
    forgetting: str | None = "mixed"
    queries: tuple[int, int] | None = None


SMALL = {
    "one token": Case(1, 1, 1, 1, 64),
    "two rows": Case(2, 300, 2, 2, 64, documents=((1, 127, 1, 128), (299, 1))),
    "three heads a group": Case(1, 530, 1, 3, 64, "bfloat16", documents=((17, 500),)),
    "documents over blocks": Case(1, 700, 1, 4, 64, documents=((130, 1, 500),)),
    "block-long documents": Case(1, 1024, 1, 1, 128, documents=((128, 384, 256),)),
    "at once": Case(1, 520, 1, 4, 64, forgetting="at once"),
    "never": Case(1, 260, 1, 1, 256, "bfloat16", forgetting="never"),
    "plain": Case(1, 520, 1, 2, 64, "bfloat16", forgetting=None),
    "plain documents": Case(1, 300, 1, 5, 80, documents=((100,),), forgetting=None),
    "a slice in the middle": Case(1, 1100, 1, 2, 64, queries=(570, 730)),
    "a slice's documents": Case(2, 1100, 1, 3, 64, "bfloat16", documents=((520, 1, 300), (100, 50)), queries=(600, 1100)),
    "a plain slice": Case(1, 300, 2, 4, 64, documents=((100,),), forgetting=None, queries=(0, 131)),
}
REAL = {
    "Qwen3-4B T=32K": Case(1, 32_768, 8, 4, 128, "bfloat16", documents=((20_000,),)),
    "Qwen3-4B T=128K": Case(1, 131_072, 8, 4, 128, "bfloat16"),
    "Qwen3-4B the last 8K of T=128K": Case(1, 131_072, 8, 4, 128, "bfloat16", queries=(122_880, 131_072)),
    "SmolLM2 B=4 T=4K float32": Case(4, 4096, 3, 3, 64, documents=((3000,), (10, 20), (4096,), (1,))),
    "D=256 T=8K": Case(1, 8192, 4, 2, 256, "bfloat16"),
}


def segment_ids(case: Case) -> np.ndarray | None:
    """Two ids by turns: that an id comes again does not make it the same document."""
    if case.documents is None:
        return None
    ids = np.zeros((case.batch, case.length), np.int32)
    for row, lengths in zip(ids, case.documents, strict=True):
        for i, end in enumerate(np.cumsum(lengths)):
            row[end:] = (i + 1) % 2
    return ids


def of_queries(case: Case) -> tuple[int, ...]:
    """q's shape."""
    begin, end = case.queries or (0, case.length)
    return case.batch, end - begin, case.heads, case.group, case.dim


def arrays(case: Case, seed: int = 0) -> dict:
    """Arguments by name."""
    random = np.random.default_rng(seed)
    per_head = (case.batch, case.length, case.heads)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), case.dtype)

    log_beta = {
        "mixed": -(10.0 ** random.uniform(-6, np.log10(50), per_head)) * (random.random(per_head) < 0.8),
        "never": np.zeros(per_head),
        "at once": np.full(per_head, -50.0),
        None: None,
    }[case.forgetting]
    ids = segment_ids(case)
    return {
        "q": normal(*of_queries(case)),
        "k": normal(*per_head, case.dim),
        "v": normal(*per_head, case.dim),
        "log_beta": None if log_beta is None else jnp.asarray(log_beta, jnp.float32),
        "segment_ids": None if ids is None else jnp.asarray(ids),
        "start": None if case.queries is None else jnp.int32(case.queries[0]),
    }


def shapes(case: Case) -> dict:
    """arrays(case) as ShapeDtypeStructs."""
    per_head, shape = (case.batch, case.length, case.heads), jax.ShapeDtypeStruct
    return {
        "q": shape(of_queries(case), case.dtype),
        "k": shape((*per_head, case.dim), case.dtype),
        "v": shape((*per_head, case.dim), case.dtype),
        "log_beta": None if case.forgetting is None else shape(per_head, jnp.float32),
        "segment_ids": None if case.documents is None else shape((case.batch, case.length), jnp.int32),
        "start": None if case.queries is None else shape((), jnp.int32),
    }
