"""The training data: a random access source of documents and the grain pipeline over it.

Every index is an independent random document, a function of (seed, index) alone, so that any worker can make any of them and a run
resumes exactly.
"""

from collections.abc import Callable

import grain
import numpy as np

from retention.training import documents, text


class Documents:
    """grain.sources.RandomAccessDataSource of documents of at most `length` tokens.

    encode: text to token ids, control strings such as <|im_end|> parsed, no BOS added (pieces are encoded one by one).
    texts: the prose (see text.load).
    Item i, with T = length and K = targets:
      tokens [T] int32, padded at the end with 0;  length () int32, at least 0.9 T
      targets [K] int32: t in [0, length - 1), whose next token t + 1 is predicted and compared
      answer [K] bool: t + 1 is a token of an assistant's answer, its closing <|im_end|> included
      valid [K] bool: false for padded slots (target 0)
    All answer tokens are targets, but at most K // 2 of them (more are dropped at random); then 64 to 160 random other tokens, as K allows.
    A share `plain_share` of the items is plain prose without answers: all K targets are random tokens.
    Raises ValueError for empty texts, a length below 192, fewer than 2 targets or a share outside [0, 1].
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        texts: list[str],
        length: int = 512,
        targets: int = 192,
        plain_share: float = 0.15,
        seed: int = 0,
    ):
        if not any(texts):
            raise ValueError("texts holds no text; give the documents that text.load returns")
        if length < 192:
            raise ValueError(f"length must be at least 192 tokens to hold a fact and a question, not {length}")
        if targets < 2:
            raise ValueError(f"targets must be at least 2 (half of them answer tokens), not {targets}")
        if not 0 <= plain_share <= 1:
            raise ValueError(f"plain_share must be between 0 and 1, not {plain_share}")
        self._encode, self._texts = encode, [one for one in texts if one]
        self._length, self._targets, self._plain_share, self._seed = length, targets, plain_share, seed

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, int(index)))
        if rng.random() < self._plain_share:
            tokens = self._plain(rng)
            is_answer = np.zeros(len(tokens), bool)
        else:
            parts = documents.document(self._texts, self._encode, rng, self._length)
            tokens = [token for part, _ in parts for token in part]
            is_answer = np.repeat([answer for _, answer in parts], [len(part) for part, _ in parts])
        return self._example(np.array(tokens, np.int32), is_answer, rng)

    def _plain(self, rng: np.random.Generator) -> list[int]:
        """Prose from a sentence's start, cut at `length` tokens."""
        tokens: list[int] = []
        chars = 5 * self._length
        while len(tokens) < self._length:  # text with long tokens, such as runs of white space, needs more characters
            tokens = self._encode(text.window(self._texts, rng, chars))
            chars *= 2
        return tokens[: self._length]

    def _example(self, tokens: np.ndarray, is_answer: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = self._targets
        predicted = is_answer[1:]
        answers = np.flatnonzero(predicted)
        answers = rng.permutation(answers)[: size // 2]
        others = rng.permutation(np.flatnonzero(~predicted))
        wanted = int(rng.integers(64, 161)) if len(answers) else size
        others = others[: min(wanted, size - len(answers))]
        used = len(answers) + len(others)
        targets = np.zeros(size, np.int32)
        targets[:used] = np.concatenate([np.sort(answers), np.sort(others)])
        padded = np.zeros(self._length, np.int32)
        padded[: len(tokens)] = tokens
        slots = np.arange(size)
        return {
            "tokens": padded,
            "length": np.int32(len(tokens)),
            "targets": targets,
            "answer": slots < len(answers),
            "valid": slots < used,
        }


def batches(source: Documents, batch_size: int, seed: int, start: int = 0) -> grain.IterDataset:
    """Endless batches: each item's arrays stacked, [B, ...]. `seed` orders the documents, `start` skips that many of them.

    The iterator's state (get_state, set_state, grain.checkpoint) is exact. One thread makes documents ahead of time, two batches of them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    dataset = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    if start:
        dataset = dataset[start:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True)
