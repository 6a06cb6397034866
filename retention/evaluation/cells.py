"""What a config asks for: the cells of its table, and what is wrong with them, found before the first is run."""

import contextlib
import dataclasses
import itertools
import numbers
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from retention import cache as cache_lib
from retention import policies
from retention.evaluation import tasks
from retention.model import Model
from retention.names import check_least, check_name, is_whole
from retention.reading import reader
from retention.rows import Rows


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table. length: None where the task has its own. scope: None for the policy's own, until `scoped`. budget: a fraction of the
    context's tokens or tokens per stream; None: all."""

    task: str
    length: int | None
    policy: str
    scope: str | None
    budget: float | int | None


def full_cell(task: str, length: int | None) -> Cell:
    """The full cache's, which the others of the same task and length are compared with."""
    return Cell(task, length, "full", "global", None)


def table(config: ConfigDict) -> list[Cell]:
    """For each task and length every policy under each of its scopes at every budget; with config.baselines the full cache and "window" too.

    Raises ValueError for a name that is not known, a number that cannot be, and a config that asks for nothing.
    """
    check_numbers(config)
    for task in config.tasks:
        tasks.check(task)
    for name in (*config.policies, *config.one_shot):
        policies.get(name)
    for scope in config.scopes:
        check_name("scope", scope, cache_lib.SCOPES)
    named = dict.fromkeys((*config.policies, *(("full", "window") if config.baselines else ())))
    for one, other in itertools.product(config.one_shot, named):
        if one not in named and other not in config.one_shot and one.partition(":")[0] == other.partition(":")[0]:
            raise ValueError(f"config.one_shot has {one} and config.policies {other}; give one name, with the same options, to both")
    cells = []
    for task in config.tasks:
        for length in config.lengths if tasks.has_length(task) else (None,):
            if "full" in named:
                cells.append(full_cell(task, length))
            for name in (name for name in named if name != "full"):
                cells += [Cell(task, length, name, scope, budget) for scope, budget in itertools.product(config.scopes or (None,), config.budgets)]
    if not cells:
        raise ValueError("there is nothing to evaluate: config.tasks, config.lengths, config.policies or config.budgets is empty")
    return list(dict.fromkeys(cells))


def scoped(cells: Sequence[Cell], model: Model) -> list[Cell]:
    """The cells, those without a scope with the one that their policy has with the model's gates."""
    return [dataclasses.replace(cell, scope=cell.scope or policies.get(cell.policy).own_scope(model.gates)) for cell in cells]


def check_numbers(config: ConfigDict) -> None:
    """Raises ValueError for a number of the config that is none, or too small."""
    check_least(config, {"samples": 1, "batch_size": 1, "max_new_tokens": 1, "continuation": 2, "seed": 0})
    if not is_whole(config.prefill_chunk, 1):
        given = config.prefill_chunk
        raise ValueError(f"config.prefill_chunk must be at least 1 token, got {given!r}; policies that read a context whole are named in config.one_shot")
    for length in config.lengths:
        if not is_whole(length, 1):
            raise ValueError(f"config.lengths must be whole numbers of tokens, got {length!r}")
    for budget in config.budgets:
        if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
            raise ValueError(f"config.budgets must be fractions of the context's tokens or tokens per stream, got {budget!r}")
    if len({isinstance(budget, numbers.Integral) for budget in config.budgets}) > 1:
        raise ValueError("config.budgets has fractions of a context and tokens per stream, which tables cannot order; give each kind a run of its own")


def empty_rows(config: ConfigDict, model: Model, cell: Cell, batch: int) -> Rows:
    return Rows(model, batch, cell.budget, cell.policy, cell.scope, config.prefill_chunk, config.sinks, config.window)


def check(config: ConfigDict, model: Model, cells: Sequence[Cell]) -> None:
    """Raises ValueError, with the cell, for one that cannot run: a scope that its policy cannot have, a budget below what is always kept, no gates.

    Also for policies of config.one_shot that cannot share a reading. A fraction of contexts that are not loaded yet: `check_fractions`.
    """
    reader(tuple(policies.get(name) for name in config.one_shot))
    for cell in cells:
        with naming(cell):
            empty_rows(config, model, cell, batch=1)


def check_fractions(config: ConfigDict, model: Model, cells: Sequence[Cell], shortest: int) -> None:
    """Raises ValueError, with the cell, for a fraction of the shortest context, in tokens, that is below one token or what is always kept."""
    for cell in cells:
        with naming(cell):
            if isinstance(cell.budget, float) and cell.budget * shortest < 1:
                raise ValueError(f"a fraction of a context must be at least one token of it, and one has {shortest} tokens; give tokens per stream")
            empty_rows(config, model, cell, batch=1).budgets([shortest])


@contextlib.contextmanager
def naming(cell: Cell) -> Iterator[None]:
    """A ValueError says at which cell."""
    try:
        yield
    except ValueError as error:
        budget = "" if cell.budget is None else f" at budget {cell.budget:g}"
        raise ValueError(f"{cell.task}{f' of {cell.length} tokens' if cell.length else ''}, {cell.policy} ({cell.scope}){budget}: {error}") from None
