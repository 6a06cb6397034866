"""Tables from evaluations: what experiments.report writes."""

from collections.abc import Sequence

NUMBERS = ("score", "low", "high", "kl", "loss", "prefill_seconds", "evict_seconds", "decode_seconds", "allocated_bytes", "kept_entries", "samples")


def typed(row: dict[str, str]) -> dict:
    """A row of results.csv with its numbers as numbers; what is empty is left out, but for length and budget, which are then None."""
    out = {name: float(value) if name in NUMBERS else value for name, value in row.items() if value != ""}
    out["length"] = int(row["length"]) if row["length"] else None
    out["budget"] = float(row["budget"]) if row["budget"] else None
    return out


def leaderboard(runs: Sequence[tuple[str, dict, Sequence[dict[str, str]]]]) -> tuple[str, list[dict]]:
    """Markdown, and the rows in it with their numbers, from (name, run_meta.json, rows of results.csv) of each run.

    A table for each task and length: the policies, best at the smallest budget first, with score (prose: KL) and 95 % interval at each budget, and the cost
    at the smallest: seconds a context to read and compress it, to answer, and the cache's MB. Then each run's commit, seed, hardware and command.
    """
    rows = [{**typed(row), "run": name} for name, _, table in runs for row in table]
    parts = ["# Leaderboard", ""]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        parts += _table([row for row in rows if (row["task"], row["length"]) == (task, length)], task, length)
    parts += ["| run | commit | seed | hardware | command |", "|---|---|---|---|---|"]
    parts += [f"| {name} | {meta['commit']} | {meta['seed']} | {meta['host'] if 'cpu' in meta['device'] else meta['device']} | `python {meta['command']}` |" for name, meta, _ in runs]
    return "\n".join(parts) + "\n", rows


def _table(rows: list[dict], task: str, length: int | None) -> list[str]:
    measure = "score" if "score" in rows[0] else "kl"
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    full = next(row for row in rows if row["policy"] == "full")
    found = {}
    for row in rows:
        if row["policy"] != "full":
            found.setdefault((row["policy"], row["scope"], row["prefill"], row["run"]), {})[row["budget"]] = row
    order = sorted(found.items(), key=lambda item: [(1 if measure == "kl" else -1) * item[1][budget][measure] for budget in reversed(budgets)])
    what = "score, 95 % interval" if measure == "score" else "KL to the full cache, nats"
    known = ", **the question known when the context is compressed**" if full["question_seen"] == "True" else ""
    title = f"## {task}{f', {length} tokens' if length else ''}"
    samples = f"{full['samples']:.0f} contexts, {full['questions']} questions a cell" if "questions" in full else f"{full['samples']:.0f} contexts a cell"
    head = ["policy (scope)", "read", *(f"{budget:.4g}" for budget in budgets), "read + compress s", "answer s", "MB", "run"]

    def shown(row: dict) -> str:
        return f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f})" if measure == "score" else f"{row['kl']:.4f}"

    def cost(row: dict) -> list[str]:
        answering = f"{row['decode_seconds']:.2f}" if "decode_seconds" in row else ""
        return [f"{row['prefill_seconds'] + row['evict_seconds']:.2f}", answering, f"{row['allocated_bytes'] / 1e6:.1f}", row["run"]]

    lines = [[f"full cache: {shown(full)}", full["prefill"], *[""] * len(budgets), *cost(full)]]
    for (policy, scope, prefill, _), cells in order:
        name = f"**{policy}** ({scope})" if policy == "retention" else f"{policy} ({scope})"
        lines.append([name, prefill, *(shown(cells[budget]) for budget in budgets), *cost(cells[budgets[-1]])])
    table = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]
    return [title, "", f"{samples}; {what}; columns are budgets{known}.", "", *table, ""]
