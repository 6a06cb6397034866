"""Tables from evaluations: what experiments.report writes."""

from collections.abc import Iterable, Sequence

from retention.evaluation.plots import label, measure_of, panels, title
from retention.names import check_name

NUMBERS = (
    "score", "low", "high", "above_full", "below_full", "kl", "loss",
    "prefill_seconds", "evict_seconds", "decode_seconds", "allocated_bytes", "kept_entries", "samples",
)  # fmt: skip

SHARED = (
    "One-shot policies share one reading of a context, in which all that any of them needs is computed, and each is charged for all of it "
    "(KVzip for its second reading too): their seconds are bounds. What each costs alone: `python -m experiments.benchmark --suite=compression`. "
    "Seconds compare within a run; another may be of another machine."
)


def typed(row: dict[str, str]) -> dict:
    """A row of results.csv with its numbers as numbers; what is empty is left out, but for length and budget, which are then None."""
    out = {name: float(value) if name in NUMBERS else value for name, value in row.items() if value != ""}
    out["length"] = int(row["length"]) if row["length"] else None
    out["budget"] = float(row["budget"]) if row["budget"] else None
    return out


def leaderboard(runs: Sequence[tuple[str, dict, dict, Sequence[dict[str, str]]]], columns: Sequence[str] = (), note: str = "") -> tuple[str, list[dict]]:
    """Markdown, and the rows in it with their numbers, from (name, config.json, run_meta.json, rows of results.csv) of each run.

    `note` stands under the title. With `columns`, `summary` follows. Then a table for each model, task and length: the full cache, then the policies, best
    at the smallest budget first, with score (prose: KL), 95 % interval and, where results.csv has them, the counts against the full cache at each budget,
    and the cost at the smallest: seconds a context to read and compress it, to answer, and the cache's MB. Then each run's commit, seed, hardware and
    command.
    """
    rows = [{**typed(row), "model": config["model"], "run": name} for name, config, _, table in runs for row in table]
    parts = ["# Leaderboard", "", *([note, ""] if note else ()), *(summary(rows, columns) if columns else ()), SHARED, ""]
    for own in panels(rows):
        if len({row["budget"] > 1 for row in own if row["budget"] is not None}) > 1:
            raise ValueError(f"{title(own[0])}: these runs have fractions of a context and tokens per stream, which no table can order; report them apart")
        parts += _table(own)
    made = []
    for name, _, meta, _ in runs:
        hardware = meta["host"] if "cpu" in meta["device"] else meta["device"]
        made.append([name, meta["commit"], str(meta["seed"]), hardware, f"`{meta['command']}`"])
    parts += _markdown(["run", "commit", "seed", "hardware", "command"], made)
    return "\n".join(parts) + "\n", rows


def summary(rows: Sequence[dict], columns: Sequence[str]) -> list[str]:
    """The lines of one table of all tasks that are scored: the full cache, the policies of `columns`, and the best of all others at each budget that all
    tasks have. Of several runs, and in the columns of several scopes, the first counts. Raises ValueError if there is no such budget, or policy."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))  # those of one task one below the other
    scored = sorted((own for own in panels(rows) if measure_of(own[0]) == "score"), key=lambda own: tasks.index(own[0]["task"]))
    budgets = sorted(set.intersection(*({row["budget"] for row in own} - {None} for own in scored)), reverse=True) if scored else []
    if not budgets:
        raise ValueError("--columns asks for a table of all tasks, but these runs have no budget in common; leave it out, or give runs of the same budgets")
    for name in columns:
        check_name("policy in these runs", name, sorted({row["policy"] for row in rows} - {"full"}))

    def cell(scores: dict) -> str:
        return " / ".join(f"{scores[budget]:.3f}" if budget in scores else "-" for budget in budgets)

    one_model = len({row["model"] for row in rows}) == 1
    head = ["scores at budgets " + " / ".join(f"{budget:.4g}" for budget in budgets), "full cache", *columns, "best of the others", "others"]
    table = []
    for own in scored:
        scores: dict[tuple, dict] = {}  # by policy and scope, then by budget
        for row in own:
            scores.setdefault((row["policy"], row["scope"]), {}).setdefault(row["budget"], row["score"])
        first = {policy: mine for (policy, _), mine in reversed(scores.items())}
        named, full = [first.get(name, {}) for name in columns], first.get("full", {}).get(None)
        others = [mine for (policy, _), mine in scores.items() if policy not in ("full", *columns)]
        best = {budget: max(found) for budget in budgets if (found := [mine[budget] for mine in others if budget in mine])}
        name = title({**own[0], "model": ""} if one_model else own[0])
        table.append([name, "" if full is None else f"{full:.3f}", *map(cell, (*named, best)), str(len(others))])
    return [*_markdown(head, table), ""]


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def _table(rows: list[dict]) -> list[str]:
    measure = measure_of(rows[0])
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    lines: dict[tuple, dict] = {}  # of one policy, read in one way, in one run: its rows by budget
    for row in rows:
        lines.setdefault((label(row), row["prefill"], row["run"]), {})[row["budget"]] = row

    def rank(cells: dict) -> list[float]:
        worst = float("inf")
        return [(-1 if measure == "score" else 1) * cells[budget][measure] if budget in cells else worst for budget in reversed(budgets)]

    def shown(row: dict) -> str:
        if measure == "kl":
            return f"{row['kl']:.4f}"
        paired = f" +{row['above_full']:.0f} -{row['below_full']:.0f}" if row["budget"] is not None and "above_full" in row else ""
        return f"{row['score']:.2f} ({row['low']:.2f}-{row['high']:.2f}){paired}"

    def line(name: str, prefill: str, run: str, cells: dict) -> list[str]:
        cheapest = list(cells.values())[-1] if None in cells else cells[min(cells)]
        if None in cells:  # the full cache
            name, values = f"{name}: {shown(cheapest)}", [""] * len(budgets)
        else:
            values = [shown(cells[budget]) if budget in cells else "" for budget in budgets]
        answering = f"{cheapest['decode_seconds']:.2f}" if "decode_seconds" in cheapest else ""
        reading = f"{cheapest['prefill_seconds'] + cheapest['evict_seconds']:.2f}"
        return [name, prefill, *values, reading, answering, f"{cheapest['allocated_bytes'] / 1e6:.1f}", f"{cheapest['samples']:.0f}", run]

    full = [(key, cells) for key, cells in lines.items() if None in cells]
    order = full + sorted(((key, cells) for key, cells in lines.items() if None not in cells), key=lambda item: rank(item[1]))
    head = ["policy (scope)", "read", *(f"{budget:.4g}" for budget in budgets), "read + compress s", "answer s", "MB", "contexts", "run"]
    what = "KL to the full cache, nats"
    if measure == "score":
        what = "Score and its 95 % interval"
        if any("above_full" in row for row in rows):
            what += ", then contexts whose score is above (+) and below (-) the full cache's"
    return [f"## {title(rows[0])}", "", f"{what}; columns are budgets.", "", *_markdown(head, (line(*key, cells) for key, cells in order)), ""]
