"""What a cache keeps of a text, as text."""

import csv
import html
import re
import subprocess
import sys

import numpy as np

from retention.evaluation import kept_text
from tests.tiny import write_folder

PIECES = ["", "user", "\n", "The", " old", " Silver", " Her", "on", ",", " 4", "8", ".", "\n\n", "wait", "", " end"]


def test_kinds_of_tokens(monkeypatch):
    monkeypatch.setattr(kept_text, "NEWEST", 1)
    assert kept_text.kinds(PIECES) == [
        "first", "first", "first", "first", "word's start", "name", "name", "word's rest", "punctuation", "digits", "digits", "punctuation", "line break",
        "word's start", "template", "newest",
    ]  # fmt: skip


def test_a_word_may_start_without_a_space(monkeypatch):
    monkeypatch.setattr(kept_text, "NEWEST", 0)
    monkeypatch.setattr(kept_text, "SINKS", 0)
    found = kept_text.kinds(["The", "y", "\n", "Mary", "ann", "\n\n", "went", " on", "ly", ",\n", "\tso", "", "user"])
    assert [found[t] for t in (0, 3, 6, 7, 10, 12)] == ["name", "name", "word's start", "word's start", "word's start", "word's start"]
    assert found[1] == found[4] == found[8] == "word's rest"


def test_shares_by_kind(monkeypatch):
    monkeypatch.setattr(kept_text, "NEWEST", 1)
    kept = kept_text.mask([[np.array([9]), np.array([], int)], [np.array([9, 10, 15]), np.array([0, 9])]], len(PIECES))
    assert kept.sum() == 6 and kept[1, 0, [9, 10, 15]].all() and not kept[0, 1].any()
    rows = {row["kind"]: row for row in kept_text.table(kept, PIECES)}
    assert rows["digits"] == {"kind": "digits", "tokens": 2, "kept": 0.5, "most in layer": 1, "most": 0.75, "least in layer": 0, "least": 0.25}
    assert rows["name"]["kept"] == 0 and rows["first"]["kept"] == 1 / 16 and sum(row["tokens"] for row in rows.values()) == len(PIECES)


def test_the_page_holds_the_text_and_every_stream():
    kept = np.zeros((2, 1, 3), bool)
    kept[1, 0, [0, 2]] = True
    page = kept_text.page(kept, ["a <b>", "", "\n$x"], "t & u")
    spans = re.findall(r"<span>(.*?)</span>", page, re.DOTALL)
    assert [html.unescape(one) for one in spans] == ["a <b>", "◊", "\n$x"] and '[["000"], ["101"]]' in page and "t &amp; u" in page


def test_the_program(tmp_path):
    folder = write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Agatha paid $48 for the boat. " * 20)
    command = [sys.executable, "-m", "experiments.kept", f"--model={folder}", "--policy=window", "--budget=0.3", f"--context={tmp_path / 'text.txt'}"]
    done = subprocess.run([*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["kind"]: row for row in csv.DictReader(open(tmp_path / "run" / "kept.csv"))}
    assert float(rows["first"]["kept"]) == float(rows["newest"]["kept"]) == 1 > float(rows["digits"]["kept"])
    assert (tmp_path / "run" / "kept.html").stat().st_size > 5_000 and (tmp_path / "run" / "kept.png").stat().st_size > 10_000
