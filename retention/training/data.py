"""The training data: sources mixed by weight, labelled, packed into rows, the rows stacked into batches.

A batch is a dict of numpy arrays [rows, T], all aligned at token t:

  tokens int32        0 where padded
  labels int32        the next token of the same document; 0 at a document's last token and where padded
  segment_ids int32   1.. per document, in order; 0 is padding, at the row's end only
  positions int32     0.. within the document; 0 where padded
  answer bool         labels[t] is an assistant's token, the one that closes its turn included
  other bool          another next-token prediction that is compared; never where `answer`

A document longer than T tokens is cut at T; if its answers all lie behind the cut, only its other tokens are compared. No document is split
otherwise, and none left out.

The global batch has B rows. Row r is a stream of its own, a function of (config, seed, r) alone: it takes the elements r, r + B, r + 2 B, ... of the
mixed documents. So it does not matter which process makes which rows, and a state kept per row resumes on any number of processes.
"""

import copy
import datetime
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from retention.checkpoints.tokenizer import Tokenizer
from retention.training.sources import Document, Source, open_source

AHEAD = 2  # batches made before they are asked for
DATE = datetime.datetime(2024, 7, 26)  # today, for chat templates that tell it: documents must not depend on the day
WINDOW = 1024  # of the mixed documents, in which their order is random and their proportions exact


class Pipeline:
    """Opens every source (raises) and makes rows of batches.

    section: the config's `data`:
      batch_size B, length T
      others: at most so many random other tokens of a document are compared beside all its answer tokens; 0: none
      workers: processes that make documents, for each row; 0: a thread makes them
      max_chars: records with more characters are skipped
      packing_bins: rows that are filled at once, each document going into the first it fits in
      sources: name -> {kind, path, weight}; see sources.py for kinds. Weights are shares of documents; one of weight 0 is left out.
    Attributes answers: whether any document holds an assistant's tokens; report: source -> {"documents": n, "skipped": {reason: count}, "first": {reason:
    place}}; digests: source -> that of its files.
    Raises ValueError for an entry that cannot be, FileNotFoundError for a missing file.
    """

    def __init__(self, section: ConfigDict, tokenizer: Tokenizer, seed: int):
        for name, least in {"batch_size": 1, "length": 2, "others": 0, "workers": 0, "max_chars": 1, "packing_bins": 1}.items():
            if section[name] < least:
                raise ValueError(f"data.{name} must be at least {least}, not {section[name]}")
        for name, entry in section.sources.items():
            if set(entry) != {"kind", "path", "weight"}:
                raise ValueError(f"data.sources.{name} needs kind, path and weight, not {', '.join(entry)}")
        weights = {name: entry.weight for name, entry in section.sources.items()}
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"data.sources need weights of at least 0, one of them above, not {weights}")
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, so no document can be read for it; put a tokenizer.json into its folder")
        self._section, self._tokenizer, self._seed = section, tokenizer.at(DATE), seed
        self._weights = {name: weight for name, weight in sorted(weights.items()) if weight}
        self._sources = {
            name: open_source(name, section.sources[name], tokenizer, section.length, section.max_chars, _derived(seed, name, "documents"))
            for name in self._weights
        }
        self.report = {name: source.report for name, source in self._sources.items()}
        self.digests = {name: source.digest for name, source in self._sources.items()}
        self.answers = any(source.answers for source in self._sources.values())

    def rows(self, rows: Sequence[int]) -> grain.DatasetIterator:
        """Endless batches of these rows [len(rows), T], in the order given.

        The iterator's get_state() is {str(row): state}, for JSON; set_state takes it back, and more rows than it needs. `close()` ends its thread and
        its workers. Raises ValueError for a row outside the global batch.
        """
        if not rows or not all(0 <= row < self._section.batch_size for row in rows):
            raise ValueError(f"rows must be some of 0 to {self._section.batch_size - 1} (data.batch_size - 1), not {list(rows)}")
        if self._section.workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read its flags, which a program without absl.app never parses
        tokenizer = copy.deepcopy(self._tokenizer)  # its encode is not for two threads at once
        iterators = {row: iter(self._row(row, tokenizer)) for row in rows}
        return grain.experimental.ThreadPrefetchDatasetIterator(_Stacked(iterators, self._section.workers), AHEAD)

    def _row(self, row: int, tokenizer: Tokenizer) -> grain.IterDataset:
        section = self._section
        parts = [
            grain.MapDataset.source(_Encoded(source, tokenizer)).shuffle(seed=_derived(self._seed, name, "order")).repeat()
            for name, source in self._sources.items()
        ]
        mixed = grain.MapDataset.mix(parts, list(self._weights.values()))
        # A mix repeats one pattern of sources; every B-th of it might be of one source only.
        mixed = grain.experimental.WindowShuffleMapDataset(mixed, window_size=WINDOW, seed=_derived(self._seed, "", "mix"))
        labelled = mixed.random_map(_Labelled(section.length, section.others), seed=_derived(self._seed, "", "others"))
        dataset = labelled[row :: section.batch_size].to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if section.workers:  # they take turns: the order is the same with any number of them
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=section.workers))
        features = ("tokens", "labels", "answer", "other")
        packed = grain.experimental.FirstFitPackIterDataset(
            dataset,
            length_struct=dict.fromkeys(features, section.length),
            num_packing_bins=section.packing_bins,
            shuffle_bins=False,
            meta_features=features[1:],
        )
        return packed.map(_renamed)


def _derived(seed: int, *names: str) -> int:
    """A seed for one use, of 31 bits."""
    return int(np.random.SeedSequence([seed, *(zlib.crc32(name.encode()) for name in names)]).generate_state(1)[0]) >> 1


class _Encoded:
    """A source as grain takes it, with the tokenizer of one thread or process."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self._source, self._tokenizer = source, tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        return self._source.document(int(index), self._tokenizer)


class _Labelled(grain.transforms.RandomMap):
    """A document, cut at `length`, with what is predicted at each token and which predictions are compared, [n] each."""

    def __init__(self, length: int, others: int):
        self._length, self._others = length, others

    def random_map(self, document: Document, rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens, is_answer = (values[: self._length] for values in document)
        answer = np.append(is_answer[1:], False)
        other = np.zeros(len(tokens), bool)
        other[rng.permutation(np.flatnonzero(~answer[:-1]))[: self._others]] = True
        return {"tokens": tokens, "labels": np.append(tokens[1:], np.int32(0)), "answer": answer, "other": other}


def _renamed(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        **{name: row[name] for name in ("tokens", "labels", "answer", "other")},
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }


class _Stacked(grain.DatasetIterator):
    """The next row of each iterator, stacked; its state is theirs, and the number of workers, without which grain would misread it."""

    def __init__(self, iterators: Mapping[int, grain.DatasetIterator], workers: int):
        super().__init__(list(iterators.values()))
        self._iterators, self._workers = iterators, workers

    def __next__(self) -> dict[str, np.ndarray]:
        rows = [next(iterator) for iterator in self._iterators.values()]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(row): {"workers": self._workers, "grain": iterator.get_state()} for row, iterator in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        missing = [row for row in self._iterators if str(row) not in state]
        if missing:
            raise ValueError(f"the data's state holds the rows {', '.join(state)}, not {missing}: give the data.batch_size that it was saved with")
        for row, iterator in self._iterators.items():
            one = state[str(row)]
            if one["workers"] != self._workers:
                raise ValueError(f"the data's state was saved with data.workers={one['workers']}: give that, not {self._workers}")
            iterator.set_state(one["grain"])
