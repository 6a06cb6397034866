"""What is left to gain on prose: python -m experiments.hindsight --config=configs/eval_prose.py --workdir=runs/hindsight --config.text='heldout/*.txt'

The same contexts and continuations as experiments.evaluate has with this config, compressed by the attention that the continuation will pay, under each
of config.scopes (none: global, layer and head) and each budget. A few minutes on 2 CPU cores; a run that was interrupted begins again. Writes
hindsight.csv: mean KL to the full cache, nats, with its standard error.
"""

from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from configs import eval_needles
from experiments import check_arguments, check_config
from retention.evaluation import hindsight, prose
from retention.evaluation.cells import check_numbers
from retention.evaluation.harness import batches, inputs, load
from retention.rows import check_budget
from retention.runs import RunFolder, write_table

CONFIG = config_flags.DEFINE_config_file("config", None, "The evaluation, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    check_arguments(argv)
    config = CONFIG.value
    check_config(config, eval_needles.get_config(), "one of configs/eval_*.py")
    check_numbers(config)
    if not config.lengths or not config.budgets:
        raise ValueError("config.lengths and config.budgets must each name at least one")
    for budget in config.budgets:
        check_budget(budget, sinks=1, window=0, floor=0)
        if isinstance(budget, float) and budget * min(config.lengths) < 1:
            raise ValueError(f"config.budgets must be at least one token of a context of {min(config.lengths)}, got {budget:g}; give tokens per stream")
    model, texts = load(config, None)
    tokens = [model.tokenizer.encode(one) for one in texts]
    run = RunFolder(WORKDIR.value, config, program="hindsight", **inputs(model, texts))
    run.keep_metrics([])
    scopes = config.scopes or ("global", "layer", "head")
    measured = []
    for length in config.lengths:
        pairs = prose.windows(tokens, length, config.continuation, config.samples, config.seed)
        for batch in tqdm(batches(config), unit="batch", desc=f"{length} tokens"):
            for row in hindsight.divergences(model, *zip(*(pairs[i] for i in batch), strict=True), scopes, config.budgets):
                measured.append({"length": length, **row})
                run.log(**measured[-1])
    rows = hindsight.table(measured)
    write_table(run.path / "hindsight.csv", rows)
    run.finish(seed=config.seed)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    app.run(main)
