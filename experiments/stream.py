"""Follows long streams with caches that evict as they go: python -m experiments.stream --config=configs/stream.py:story --workdir=runs/story

Writes stream.csv (mean loss and KL to the full cache in each part of the stream, and, of stories, how many answered at the end) and stream.png. The
caches are kept in caches/ after each part while it runs, and an interrupted run goes on from there.
"""

import shutil

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from configs import stream as stream_config
from experiments import check_arguments, check_config
from retention import chat
from retention.evaluation import needles, prose, streaming
from retention.evaluation.harness import inputs, load
from retention.evaluation.plots import plot_streams
from retention.generation import check_sampling
from retention.model import Model
from retention.names import check_name, is_whole
from retention.rows import Rows
from retention.runs import RunFolder, write_table

CONFIG = config_flags.DEFINE_config_file("config", None, "The streams, configs/stream.py:story or :prose.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
flags.mark_flags_as_required(["config", "workdir"])


def begin_stream(config: ConfigDict, model: Model, texts: list[str], samples: list[needles.Sample]) -> tuple[list[list[int]], np.ndarray]:
    """What the caches read first, and the tokens [B, T] that follow: the model's own if there are samples, else prose."""
    if samples:
        encode = chat.encoder(model.tokenizer)
        prompts = [encode(sample.context, bos=True) for sample in samples]
        return prompts, streaming.tell(model, prompts, config.tokens, config.temperature, config.seed)
    pairs = prose.windows([model.tokenizer.encode(one) for one in texts], config.piece, config.tokens, config.samples, config.seed)
    return [prompt for prompt, _ in pairs], np.array([tokens for _, tokens in pairs])


def check(config: ConfigDict) -> None:
    """Raises ValueError for what there are no streams of, and a stream that cannot be cut as the config says."""
    check_name("kind of stream", config.kind, stream_config.KINDS)
    check_sampling(1, config.temperature, 1.0, config.seed)
    if not config.policies or not config.budgets:
        raise ValueError("config.policies and config.budgets must each name at least one; the full cache is there beside them")
    if config.samples < 1 or config.piece < 1:
        raise ValueError(f"config.samples and config.piece must be at least 1, got {config.samples} and {config.piece}")
    if config.tokens < config.piece or config.tokens % config.piece:
        raise ValueError(f"config.tokens must be a multiple of config.piece, {config.piece}, got {config.tokens}")
    for budget in config.budgets:
        if not is_whole(budget, 1):  # a fraction would be one of what is read first
            raise ValueError(f"config.budgets must be whole numbers of tokens per stream, got {budget!r}")
    if not 1 <= config.bins <= config.tokens // config.piece:
        raise ValueError(f"config.bins must be from 1 to the stream's {config.tokens // config.piece} pieces, got {config.bins}")


def main(argv):
    check_arguments(argv)
    config = CONFIG.value
    check_config(config, stream_config.get_config(), "configs/stream.py:story or :prose")
    check(config)
    model, texts = load(config, config.gates)
    run = RunFolder(WORKDIR.value, config, program="stream", **inputs(model, texts))
    if (run.path / "stream.csv").exists():
        print(f"{run.path / 'stream.csv'} is there: this run has come to its end")
        return
    kinds = {"full": ("full", None)} | {f"{policy} {budget}": (policy, budget) for policy in config.policies for budget in config.budgets}
    caches = {name: Rows(model, config.samples, budget, policy, prefill_chunk=config.piece) for name, (policy, budget) in kinds.items()}
    samples = streaming.stories(config.samples, config.seed) if config.kind == "story" else []
    kept, share = run.path / "caches", max(1, config.tokens // config.bins)
    stream, done = streaming.resume(kept, caches)
    run.keep_metrics([record for record in run.metrics() if record["begin"] < done])
    if stream is None:
        prompts, stream = begin_stream(config, model, texts, samples)
        for rows in caches.values():
            rows.append(prompts)
    pieces = streaming.follow(caches, stream, config.piece, done)
    for begin, name, loss, kl in tqdm(pieces, total=len(caches) * (config.tokens // config.piece), initial=len(run.metrics()), unit="piece"):
        policy, budget = kinds[name]
        run.log(policy=policy, budget=budget, begin=begin, loss=round(float(loss.mean()), 5), kl=round(float(kl.mean()), 5))
        if name == list(kinds)[-1] and (begin + config.piece) // share > begin // share:
            streaming.save(kept, caches, stream, begin + config.piece)

    edges, records, rows = np.linspace(0, config.tokens, config.bins + 1), run.metrics(), []
    for name, (policy, budget) in kinds.items():
        own = [record for record in records if (record["policy"], record["budget"]) == (policy, budget)]
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            part = [record for record in own if first <= record["begin"] < last]
            means = {measure: round(float(np.mean([record[measure] for record in part])), 4) for measure in ("loss", "kl")}
            rows.append({"policy": policy, "budget": budget, "from": int(first), "to": int(last), **means, "answered": ""})
        if samples:
            rows[-1]["answered"] = sum(streaming.remembered(caches[name], samples))
        print(f"{name:16} loss {[row['loss'] for row in rows[-config.bins :]]} KL {[row['kl'] for row in rows[-config.bins :]]}", rows[-1]["answered"])
    plot_streams(rows, run.path / "stream.png")
    run.finish(seed=config.seed)
    write_table(run.path / "stream.csv", rows)  # last, as it says that the run is at its end
    shutil.rmtree(kept, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
