"""What a cache keeps of a text, as text: each token shaded by the share of streams that keep it, and which kinds of tokens stay."""

import html
import json
import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

SINKS, NEWEST = 4, 32  # tokens at both ends that count as kinds of their own
KINDS = ("first", "newest", "template", "digits", "name", "punctuation", "line break", "word's start", "word's rest")

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>%(title)s</title>
<style>
  body {font: 15px/1.6 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff}
  #text {white-space: pre-wrap; overflow-wrap: anywhere}
  select {font: inherit}
</style>
<p>%(title)s. Shown: <select id="stream"></select></p>
<div id="text">%(text)s</div>
<script>
// kept[layer][head]: a string with 1 for each token that the stream keeps.
const kept = %(kept)s, spans = [...document.querySelectorAll("#text span")], select = document.getElementById("stream");
const views = [["all streams, by their share", kept.flat()]];
kept.forEach((heads, layer) => {
  views.push([`layer ${layer}, all heads`, heads]);
  heads.forEach((one, head) => views.push([`layer ${layer}, head ${head}`, [one]]));
});
views.forEach(([name], i) => select.add(new Option(name, i)));
function show() {
  const streams = views[select.value][1];
  const shares = spans.map((_, t) => streams.filter(one => one[t] == "1").length / streams.length);
  const most = Math.max(...shares, 1e-9);
  spans.forEach((span, t) => {
    span.style.background = `rgba(200,30,30,${(0.85 * shares[t] / most).toFixed(2)})`;
    span.title = `token ${t}: kept by ${(100 * shares[t]).toFixed(0)} %% of the streams shown`;
  });
}
select.onchange = show;
show();
</script>
"""


def mask(kept: Sequence[Sequence[np.ndarray]], tokens: int) -> np.ndarray:
    """[L, H, T] bool from [layer][head] arrays of the positions kept."""
    out = np.zeros((len(kept), len(kept[0]), tokens), bool)
    for layer, heads in enumerate(kept):
        for head, positions in enumerate(heads):
            out[layer, head, positions] = True
    return out


def kinds(pieces: Sequence[str]) -> list[str]:
    """Which of KINDS each token is, from its text, "" for those of the chat template.

    A word starts with the space before it, and where none can be: at a line's start, a text's, and behind a token of the template.
    """
    out, before = [], ""
    for t, piece in enumerate(pieces):
        bare = piece.strip()
        if t < SINKS:
            kind = "first"
        elif t >= len(pieces) - NEWEST:
            kind = "newest"
        elif not piece:
            kind = "template"
        elif not bare:
            kind = "line break"
        elif bare.isdigit():
            kind = "digits"
        elif not any(letter.isalnum() for letter in bare):
            kind = "punctuation"
        elif piece[0].isspace() or not before or before.endswith("\n"):
            kind = "name" if bare[0].isupper() else "word's start"
        else:
            kind = "word's rest"
        out.append(kind)
        before = piece
    return out


def table(kept: np.ndarray, pieces: Sequence[str]) -> list[dict]:
    """For each kind of token how many there are, the share of their entries that is kept, and in which layer most and least is."""
    labels, rows = np.array(kinds(pieces)), []
    for kind in (kind for kind in KINDS if (labels == kind).any()):
        by_layer = kept[:, :, labels == kind].mean(axis=(1, 2))
        rows.append(
            {"kind": kind, "tokens": int((labels == kind).sum()), "kept": round(float(by_layer.mean()), 4)}
            | {"most in layer": int(by_layer.argmax()), "most": round(float(by_layer.max()), 4)}
            | {"least in layer": int(by_layer.argmin()), "least": round(float(by_layer.min()), 4)}
        )
    return rows


def page(kept: np.ndarray, pieces: Sequence[str], title: str) -> str:
    """An HTML page with the text, its tokens shaded, for all streams or for one."""
    text = "".join(f"<span>{html.escape(piece) or '&loz;'}</span>" for piece in pieces)
    bits = [["".join("01"[int(one)] for one in row) for row in heads] for heads in kept]
    return _PAGE % {"title": html.escape(title), "text": text, "kept": json.dumps(bits)}


def plot(kept: np.ndarray, pieces: Sequence[str], title: str, path: pathlib.Path, columns: int = 120) -> None:
    """The text in lines of `columns` characters, each token on a ground as dark as the share of streams that keep it."""
    share = kept.mean(axis=(0, 1))
    line, column, placed = 0, 0, []
    for piece, one in zip(pieces, share / max(share.max(), 1e-9), strict=True):
        shown = piece.replace("\n", "↵") or "◊"
        if column + len(shown) > columns:
            line, column = line + 1, 0
        placed.append((line, column, shown, one))
        column += len(shown)
        if "\n" in piece:
            line, column = line + 1, 0
    figure, axis = plt.subplots(figsize=(columns * 0.0635, (line + 3) * 0.17), layout="constrained")
    for line, column, shown, one in placed:
        axis.add_patch(plt.Rectangle((column, line - 0.5), len(shown), 1, color=plt.cm.Reds(0.85 * one), linewidth=0))
        axis.text(column, line, shown.replace("$", r"\$"), family="monospace", fontsize=7.5, va="center", color="white" if one > 0.75 else "black")
    axis.set(xlim=(0, columns), ylim=(placed[-1][0] + 1, -1))
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
