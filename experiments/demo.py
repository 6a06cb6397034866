"""The story in one go: SmolLM2-135M-Instruct reads a story of 2,200 tokens and answers questions about it three times, with the full cache, and with
25 % and 12.5 % of the entries kept by learned global gates: python -m experiments.demo --workdir=runs/demo."""

import pathlib
import time

from absl import app, flags

import retention
from experiments import check_arguments
from retention.evaluation.plots import plot_kept

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the pictures go.")

# What the story says, and a word that a right answer holds. Written for this demo: the gates never saw it.
QUESTIONS = (
    ("What is the number painted on the lid of the iron box?", "48213"),
    ("Why did the ferry stop?", "boiler"),
    ("What was the name of the boat?", "Silver Heron"),
    ("Where was the key of the pumping station hidden?", "organ"),
    ("What was the price of the new boiler?", "9750"),
    ("Why was the school closed in January?", "bees"),
)


def main(argv):
    check_arguments(argv)
    folder = pathlib.Path(WORKDIR.value).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model = retention.load("smollm2-135m", gates="shipped")
    story = (pathlib.Path(__file__).parent / "demo_document.txt").read_text(encoding="utf-8")
    # The user's turn, left open: the story is read and compressed before any question is known.
    opened, closed = model.tokenizer.turn()
    for fraction in (None, 0.25, 0.125):
        session = retention.Session(model, budget=fraction)
        start = time.time()
        session.append(opened + story)
        stats, seconds = session.stats, time.time() - start
        entries = stats.seen_tokens * model.config.streams
        share = stats.kept_entries / entries
        print(f"\n== {stats.seen_tokens} tokens read in {seconds:.1f} s: {stats.kept_entries:,} of {entries:,} entries kept ({share:.1%}),", end="")
        print(f" {stats.allocated_bytes / 2**20:.0f} MiB of cache")
        right = 0
        for question, answer in QUESTIONS:
            print(f"Q: {question}\nA: ", end="")
            pieces = []
            for piece in session.fork().stream(f"\n\n{question}{closed}", max_new_tokens=32):
                print(piece, end="", flush=True)
                pieces.append(piece)
            good = answer.lower() in "".join(pieces).lower()
            print("" if good else f"   [the story says: {answer}]")
            right += good
        print(f"{right} of {len(QUESTIONS)} right with {share:.1%} of the entries")
        if fraction:
            title = f"{share:.1%} of the entries kept: darker is more; right, each stream's share"
            plot_kept(session.kept(), stats.seen_tokens, folder / f"kept_{fraction}.png", title)
    print(f"\nWhich positions each layer and head kept: {folder}/kept_*.png")


if __name__ == "__main__":
    app.run(main)
