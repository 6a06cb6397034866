"""What a budget leaves of a text, as text: python -m experiments.kept --context=book.txt --budget=0.125 --workdir=runs/kept

Writes kept.html (tokens shaded by the share of streams that keep them, or by one layer and head), kept.png, and kept.csv: which kinds of tokens stay. Half a
minute on 2 CPU cores.
"""

import pathlib

from absl import app, flags
from ml_collections import ConfigDict

import retention
from experiments import check_arguments
from retention.evaluation import kept_text
from retention.generation import check_text
from retention.rows import check_budget
from retention.runs import RunFolder, write_table
from retention.training import text

CONTEXT = flags.DEFINE_string("context", None, "A text file, read as a user's turn if the model has a chat template; the demo's story unless given.")
BUDGET = flags.DEFINE_float("budget", 0.125, "The fraction of the entries that stays, above 0.", lower_bound=0, upper_bound=1)
POLICY = flags.DEFINE_string("policy", "retention", "Which policy evicts.")
MODEL = flags.DEFINE_string("model", "smollm2-135m", "The model, a name, a folder or a .gguf file.")
GATES = flags.DEFINE_string("gates", "auto", "Its gates, a file, or none; auto: those shipped with it, if any.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
flags.mark_flag_as_required("workdir")


def main(argv):
    check_arguments(argv)
    file = pathlib.Path(CONTEXT.value or pathlib.Path(__file__).parent / "demo_document.txt")
    # What can be wrong is looked at before the model is loaded, which may take minutes.
    policy, context = retention.policies.get(POLICY.value), text.read(file)
    check_budget(BUDGET.value, sinks=0, window=0, floor=0)
    run = RunFolder(WORKDIR.value, ConfigDict(dict(context=str(file), budget=BUDGET.value, policy=POLICY.value, model=MODEL.value, gates=GATES.value)))
    model = retention.load(MODEL.value, gates=GATES.value)
    check_text(model, context, "context")
    read = (model.tokenizer.turn()[0] if model.tokenizer.chat_template else "") + context
    tokens = model.tokenizer.encode(read)
    session = retention.Session(model, budget=BUDGET.value, policy=policy)
    session.append(read)
    kept, pieces = kept_text.mask(session.kept(), len(tokens)), [model.tokenizer.decode([token]) for token in tokens]
    title = f"{file.name}: {len(tokens)} tokens, {kept.mean():.1%} of the entries kept by {POLICY.value}"
    (run.path / "kept.html").write_text(kept_text.page(kept, pieces, title), encoding="utf-8")
    kept_text.plot(kept, pieces, title, run.path / "kept.png")
    rows = kept_text.table(kept, pieces)
    write_table(run.path / "kept.csv", rows)
    run.finish()
    print(title)
    for row in rows:
        print(f"{row['kind']:14} {row['tokens']:5} tokens, {row['kept']:6.1%} kept; most in layer {row['most in layer']} ({row['most']:.0%}), ", end="")
        print(f"least in layer {row['least in layer']} ({row['least']:.0%})")


if __name__ == "__main__":
    app.run(main)
