"""The story in one go: SmolLM2-135M-Instruct reads a document of several thousand tokens and answers questions about it three times, with the full
cache, and with 25 % and 12.5 % of the entries kept by learned global gates: python -m experiments.demo --workdir=runs/demo."""

import pathlib
import time

from absl import app, flags

import retention
from retention.evaluation import needles
from retention.evaluation.plots import plot_kept
from retention.training import text

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the pictures go.")
LENGTH = flags.DEFINE_integer("length", 3072, "Tokens of the document.")


def main(_):
    folder = pathlib.Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    model = retention.load("smollm2-135m", gates="shipped")
    # Python's own manual with four numbers and three facts planted in it: words, phrasings and prose that the gates never saw.
    texts = text.load("pydoc")
    documents = [needles.samples(task, model.tokenizer.encode, texts, LENGTH.value, 1, seed=7)[0] for task in ("needle4", "facts")]
    for fraction in (1.0, 0.25, 0.125):
        budget = None if fraction == 1.0 else int(fraction * LENGTH.value)
        right = asked = 0
        for number, document in enumerate(documents):
            start = time.time()
            session = retention.Session(model, budget)
            session.append(document.context)
            stats, seconds = session.stats, time.time() - start
            entries = stats.seen_tokens * model.config.streams
            print(
                f"\n== document {number + 1}, {stats.seen_tokens} tokens: {stats.kept_entries:,} of {entries:,} entries kept"
                f" ({stats.kept_entries / entries:.1%}), {stats.allocated_bytes / 2**20:.0f} MiB, read in {seconds:.1f} s"
            )
            if budget:
                title = f"kept at {fraction:.1%}: darker is more; right: each stream's share"
                plot_kept(session.kept(), stats.seen_tokens, folder / f"kept_{fraction:.3f}_document{number + 1}.png", title)
            for question, answer in zip(document.questions, document.answers, strict=True):
                print("Q:", question.strip().split("<|im_end|>")[0], "\nA: ", end="")
                pieces = []
                for piece in session.fork().stream(question, max_new_tokens=24):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                good = needles.correct("needle4" if number == 0 else "facts", answer, "".join(pieces))
                right, asked = right + good, asked + 1
                print("" if good else f"   [the text says: {answer}]")
        print(f"\n{right} of {asked} right with {fraction:.1%} of the entries")
    print(f"\nWhich positions each layer and head kept: {folder}/*.png")


if __name__ == "__main__":
    app.run(main)
