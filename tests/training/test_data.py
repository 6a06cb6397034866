"""The data pipeline: what a batch holds, that packing loses nothing, and that rows are the same whoever makes them and wherever they resume."""

import collections
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import processors

from retention.checkpoints.tokenizer import Tokenizer
from retention.training import data
from tests.tiny import TEMPLATE, write_folder

CHAT = [
    {"role": "user", "content": "What is a tuple?"},
    {"role": "assistant", "content": "An immutable sequence."},
    {"role": "user", "content": "And a list?"},
    {"role": "assistant", "content": "A mutable one,\n\n as `list` says. "},
]
FACTS = {"kind": "facts", "path": "pydoc", "weight": 0.75}
TEXT = {"kind": "text", "path": "pydoc", "weight": 0.25}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("model")))


def section(sources, **changes):
    entries = dict(batch_size=2, length=256, others=32, workers=0, max_chars=100_000, packing_bins=1, sources=sources)
    return ConfigDict(entries | changes)


def records(tmp_path, contents, weight=1.0):
    """A source of JSON lines: a str is a plain document, a list a conversation."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps({"text" if isinstance(one, str) else "messages": one}) + "\n" for one in contents))
    return {"kind": "records", "path": str(path), "weight": weight}


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name], name)


def documents_of(row):
    """The token sequences of one row of a batch, [T] arrays, after checking how they are laid out."""
    ids, positions = row["segment_ids"], row["positions"]
    count = ids.max()
    assert count >= 1
    found = [row["tokens"][ids == number] for number in range(1, count + 1)]
    laid_out = np.concatenate([np.full(len(one), number + 1) for number, one in enumerate(found)])
    np.testing.assert_array_equal(ids, np.pad(laid_out, (0, len(ids) - len(laid_out))))
    np.testing.assert_array_equal(positions[: len(laid_out)], np.concatenate([np.arange(len(one)) for one in found]))
    np.testing.assert_array_equal(row["labels"][: len(laid_out)], np.concatenate([np.append(one[1:], 0) for one in found]))
    for name in ("tokens", "labels", "positions", "answer", "other"):
        assert not row[name][len(laid_out) :].any(), name
    ends = np.append(np.flatnonzero(positions[1 : len(laid_out)] == 0), len(laid_out) - 1)
    assert not (row["answer"] | row["other"])[ends].any()
    assert not (row["answer"] & row["other"]).any()
    return found


def test_batch_of_facts_and_text(tokenizer):
    length = 256
    pipeline = data.Pipeline(section({"facts": FACTS, "text": TEXT}), tokenizer, seed=3)
    assert set(pipeline.report) == {"facts", "text"} and pipeline.report["facts"]["skipped"] == {}
    plain = 0
    for batch in take(pipeline.rows([0, 1]), 40):
        assert {name: (values.shape, values.dtype.name) for name, values in batch.items()} == {
            "tokens": ((2, length), "int32"),
            "labels": ((2, length), "int32"),
            "segment_ids": ((2, length), "int32"),
            "positions": ((2, length), "int32"),
            "answer": ((2, length), "bool"),
            "other": ((2, length), "bool"),
        }
        for row in range(2):
            one = {name: values[row] for name, values in batch.items()}
            (document,) = documents_of(one)
            assert 0.85 * length <= len(document) <= length
            assert one["other"].sum() == 32
            plain += not one["answer"].any()
    assert 10 <= plain <= 30  # of 80; exact within a window of 1,024


@pytest.mark.parametrize("source", [FACTS, TEXT], ids=["facts", "text"])
def test_a_document_begins_as_the_tokenizer_begins_texts(tmp_path, source):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model"))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (batch,) = take(data.Pipeline(section({"x": source}), tokenizer, seed=0).rows([0]), 1)
    assert (batch["tokens"][0][batch["segment_ids"][0] == 1] == 0).nonzero()[0].tolist() == [0]


def test_chat_labels_are_the_assistants_turns(tokenizer, tmp_path):
    pipeline = data.Pipeline(section({"chat": records(tmp_path, [CHAT])}, batch_size=1, others=7), tokenizer, seed=0)
    first, second = take(pipeline.rows([0]), 2)
    row = {name: values[0] for name, values in first.items()}
    document = documents_of(row)[0]
    answers = [f"{CHAT[turn]['content']}<|im_end|>" for turn in (1, 3)]
    only = row["answer"] & (row["segment_ids"] == 1)
    assert row["labels"][only].tolist() == [token for answer in answers for token in tokenizer.encode(answer)]
    assert tokenizer.decode(row["labels"][only]) == CHAT[1]["content"] + CHAT[3]["content"]
    assert tokenizer.decode(document) == tokenizer.decode(tokenizer.encode(tokenizer.chat(CHAT, add_generation_prompt=False)))
    for number in range(1, row["segment_ids"].max() + 1):
        assert (row["other"] & (row["segment_ids"] == number)).sum() == 7
    assert not np.array_equal(first["other"], second["other"])


def test_few_tokens_are_all_compared(tokenizer, tmp_path):
    pipeline = data.Pipeline(section({"chat": records(tmp_path, [CHAT])}, others=10_000), tokenizer, seed=0)
    (batch,) = take(pipeline.rows([0]), 1)
    has_next = (batch["segment_ids"] > 0) & (np.roll(batch["positions"], -1, 1) > 0)
    np.testing.assert_array_equal(batch["answer"] | batch["other"], has_next)


def test_long_documents_are_cut(tokenizer, tmp_path):
    long = [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "Yes."}]
    pipeline = data.Pipeline(section({"chat": records(tmp_path, [long])}, length=64, others=9), tokenizer, seed=0)
    (batch,) = take(pipeline.rows([0]), 1)
    whole = tokenizer.encode(tokenizer.chat(long, add_generation_prompt=False))
    assert batch["tokens"][0].tolist() == whole[:64]
    assert not batch["answer"].any() and batch["other"].sum() == 9


@pytest.mark.parametrize("bins", [1, 3])
def test_packing_loses_and_splits_nothing(tokenizer, tmp_path, monkeypatch, bins):
    count, length = 32, 96
    monkeypatch.setattr(data, "WINDOW", count)
    rng = np.random.default_rng(0)
    texts = [" ".join(str(number) for number in rng.integers(10, 99, size)) for size in rng.integers(1, 40, count)]
    pipeline = data.Pipeline(section({"text": records(tmp_path, texts)}, batch_size=1, length=length, packing_bins=bins), tokenizer, seed=1)
    sizes = [len(tokenizer.encode(one)) for one in texts]
    assert max(sizes) > length  # one is cut
    expected = {tuple(tokenizer.encode(one)[:length]) for one in texts}
    iterator = pipeline.rows([0])
    seen, per_row = collections.Counter(), []
    for _ in range(90):
        batch = next(iterator)
        found = documents_of({name: values[0] for name, values in batch.items()})
        per_row.append(len(found))
        seen.update(tuple(one.tolist()) for one in found)
        state = iterator.get_state()["0"]["grain"]
        taken = state["parent"]["next_index"]
        if state["next_row"] == 0:  # no row is open: what was taken has been given
            assert seen.total() == taken
            assert set(seen) <= expected
            assert {seen[one] for one in expected} <= {taken // count, taken // count + 1}
    iterator.close()
    assert set(seen) == expected and max(per_row) > 1


def test_records_come_in_an_order_of_the_seed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 1)  # else the mix shuffles them too, as far as it reaches
    source, filed = records(tmp_path, [f"Number {number}." for number in range(40)]), [tuple(tokenizer.encode(f"Number {number}.")) for number in range(40)]

    def order(seed):
        batches = take(data.Pipeline(section({"text": source}, batch_size=1, length=24), tokenizer, seed).rows([0]), 8)
        return [tuple(one.tolist()) for batch in batches for one in documents_of({name: values[0] for name, values in batch.items()})][:8]

    first, other = order(0), order(1)
    assert first != filed[:8] and first != other and set(first) | set(other) < set(filed)


def test_documents_do_not_depend_on_the_day(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "model"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE
    pipeline = data.Pipeline(section({"chat": records(tmp_path, [CHAT])}), tokenizer, seed=0)
    (batch,) = take(pipeline.rows([0]), 1)
    assert tokenizer.decode(batch["tokens"][0]).startswith(data.DATE.strftime("%d %b %Y "))


def test_rows_share_the_documents_out(tokenizer, tmp_path, monkeypatch):
    """Of 30, each of 3 rows has 10 in an epoch, and no other has them."""
    monkeypatch.setattr(data, "WINDOW", 30)
    texts = [f"Number {number}." for number in range(30)]
    pipeline = data.Pipeline(section({"text": records(tmp_path, texts)}, batch_size=3, length=24), tokenizer, seed=1)
    batches = take(pipeline.rows([0, 1, 2]), 12)
    first = [[tuple(one.tolist()) for batch in batches for one in documents_of({name: values[row] for name, values in batch.items()})][:10] for row in range(3)]
    assert sorted(sum(first, [])) == sorted(tuple(tokenizer.encode(one)) for one in texts)


def test_rows_do_not_depend_on_their_company(tokenizer, tmp_path):
    sources = {"facts": FACTS, "chat": records(tmp_path, [CHAT, CHAT[:2]])}
    pipeline = data.Pipeline(section(sources, batch_size=3, packing_bins=2), tokenizer, seed=5)
    together = take(pipeline.rows([0, 2]), 5)
    first, last = take(pipeline.rows([0]), 5), take(pipeline.rows([2]), 5)
    assert_same(together, [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(first, last, strict=True)])
    assert not np.array_equal(first[0]["tokens"], last[0]["tokens"])


def test_seed_decides(tokenizer):
    pipelines = [data.Pipeline(section({"facts": FACTS, "text": TEXT}), tokenizer, seed) for seed in (1, 1, 2)]
    same, again, other = (take(pipeline.rows([1]), 2) for pipeline in pipelines)
    assert_same(same, again)
    assert not np.array_equal(same[0]["tokens"], other[0]["tokens"])


def test_resumes_exactly_from_every_state(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    texts = ["word " * int(size) for size in rng.integers(1, 40, 50)]
    sources = {"chat": records(tmp_path, [CHAT, CHAT[:2]]), "text": records(tmp_path, texts)}
    pipeline = data.Pipeline(section(sources, length=128, packing_bins=3), tokenizer, seed=0)
    iterator = pipeline.rows([0, 1])
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    assert {state["0"]["grain"]["next_row"] for state in states} == {0, 1, 2}
    for step, state in enumerate(states):
        fresh = pipeline.rows([1])  # half of the rows, as on another number of processes
        fresh.set_state(state)
        assert fresh.get_state() == {"1": state["1"]}
        assert_same(take(fresh, len(batches) - step), [{name: values[1:] for name, values in batch.items()} for batch in batches[step:]])
    iterator.set_state(states[4])  # back, with batches made ahead
    assert_same(take(iterator, 2), batches[4:6])


@pytest.mark.slow
def test_workers_change_nothing(tokenizer, tmp_path):
    sources = {"facts": FACTS, "chat": records(tmp_path, [CHAT, CHAT[:2]])}
    threads, workers = (data.Pipeline(section(sources, workers=number), tokenizer, seed=0) for number in (0, 2))
    expected = take(threads.rows([1]), 6)
    iterator = workers.rows([1])
    assert_same([next(iterator) for _ in range(3)], expected[:3])
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = workers.rows([1])
    resumed.set_state(state)
    assert_same(take(resumed, 3), expected[3:])
    with pytest.raises(ValueError, match="data.workers=2"):
        threads.rows([1]).set_state(state)


def test_weights(tokenizer, tmp_path):
    sources = {"a": records(tmp_path, ["alpha"], 3.0), "b": records(tmp_path, ["beta"], 1.0), "off": {"kind": "records", "path": "no", "weight": 0.0}}
    pipeline = data.Pipeline(section(sources, batch_size=4, length=64), tokenizer, seed=0)
    assert set(pipeline.report) == {"a", "b"}
    alpha = tuple(tokenizer.encode("alpha"))
    for batch in take(pipeline.rows([0, 1, 2, 3]), 1):
        for row in range(4):  # every row has some of each, though 4 rows take turns at a pattern of 4 documents
            found = [tuple(one.tolist()) == alpha for one in documents_of({name: values[row] for name, values in batch.items()})]
            assert 0.4 < np.mean(found) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"others": -1}, "data.others"),
        ({"workers": -1}, "data.workers"),
        ({"packing_bins": 0}, "data.packing_bins"),
        ({"length": 100}, "data.length must be at least 192"),
        ({"sources": {}}, "weights"),
        ({"sources": {"x": FACTS | {"weight": -1.0}}}, "weights"),
        ({"sources": {"x": FACTS | {"kind": "fact"}}}, "data.sources.x.kind must be one of facts, text, records"),
        ({"sources": {"x": {"kind": "facts", "weight": 1.0}}}, "data.sources.x needs kind, path and weight"),
    ],
)
def test_config_errors(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        data.Pipeline(section(**{"sources": {"facts": FACTS}, **changes}), tokenizer, seed=0)


def test_a_corpus_shorter_than_a_document_is_told(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("A few words. " * 30)
    source = {"kind": "text", "path": f"{tmp_path}/short.txt", "weight": 1.0}
    with pytest.warns(UserWarning, match="short.txt has 389 characters, fewer than the 200 tokens of a document take"):
        data.Pipeline(section({"x": source}, length=200), tokenizer, seed=0)


def test_use_errors(tokenizer):
    pipeline = data.Pipeline(section({"facts": FACTS}), tokenizer, seed=0)
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="0 to 1"):
            pipeline.rows(rows)
    with pytest.raises(ValueError, match=r"holds the rows 0, not \[1\]"):
        pipeline.rows([1]).set_state(pipeline.rows([0]).get_state())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.Pipeline(section({"text": TEXT | {"path": "nowhere.txt"}}), tokenizer, seed=0)
