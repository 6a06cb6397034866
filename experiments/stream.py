"""Follows long streams with caches that evict as they go: python -m experiments.stream --config=configs/stream.py:story --workdir=runs/story

Writes stream.csv (mean loss and KL to the full cache in each part of the stream, and, of stories, how many answered at the end) and stream.png. The
caches advance together, so a run that was interrupted begins again.
"""

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from retention import checkpoints
from retention.evaluation import prose, streaming
from retention.evaluation.plots import plot_streams
from retention.rows import Rows
from retention.runs import RunFolder, write_table
from retention.training import text

CONFIG = config_flags.DEFINE_config_file("config", None, "The streams, configs/stream.py:story or :prose.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    config = CONFIG.value
    run = RunFolder(WORKDIR.value, config)
    run.keep_metrics([])
    model = checkpoints.load(config.model, gates=config.gates, dtype=config.dtype)
    encode = model.tokenizer.encode
    if config.kind == "story":
        samples = streaming.stories(config.samples, config.seed)
        prompts = [encode(sample.context, bos=True) for sample in samples]
        stream = streaming.tell(model, prompts, config.tokens, config.temperature, config.seed)
    else:
        pairs = prose.windows([encode(one) for one in text.load(config.text)], config.piece, config.tokens, config.samples, config.seed)
        prompts, stream = [prompt for prompt, _ in pairs], np.array([tokens for _, tokens in pairs])

    kinds = {"full": ("full", None)} | {f"{policy} {budget}": (policy, budget) for policy in config.policies for budget in config.budgets}
    caches = {name: Rows(model, config.samples, budget, policy, prefill_chunk=config.piece) for name, (policy, budget) in kinds.items()}
    for rows in caches.values():
        rows.append(prompts)
    total = len(caches) * (config.tokens // config.piece)
    for begin, name, loss, kl in tqdm(streaming.follow(caches, stream, config.piece), total=total, unit="piece"):
        policy, budget = kinds[name]
        run.log(policy=policy, budget=budget, begin=begin, loss=round(float(loss.mean()), 5), kl=round(float(kl.mean()), 5))

    edges, records, rows = np.linspace(0, config.tokens, config.bins + 1), run.metrics(), []
    for name, (policy, budget) in kinds.items():
        own = [record for record in records if (record["policy"], record["budget"]) == (policy, budget)]
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            part = [record for record in own if first <= record["begin"] < last]
            means = {measure: round(float(np.mean([record[measure] for record in part])), 4) for measure in ("loss", "kl")}
            rows.append({"policy": policy, "budget": budget, "from": int(first), "to": int(last), **means, "answered": ""})
        if config.kind == "story":
            rows[-1]["answered"] = sum(streaming.remembered(caches[name], samples))
        print(f"{name:16} loss {[row['loss'] for row in rows[-config.bins :]]} KL {[row['kl'] for row in rows[-config.bins :]]}", rows[-1]["answered"])
    write_table(run.path / "stream.csv", rows)
    plot_streams(rows, run.path / "stream.png")
    run.finish(seed=config.seed)


if __name__ == "__main__":
    app.run(main)
