"""The leaderboard: every policy of the registry, each run as its paper has it, on SmolLM2-135M; 64 contexts a cell.

    python -m experiments.evaluate --config=configs/eval_leaderboard.py --workdir=runs/leaderboard --config.text='heldout/*.txt'
    python -m experiments.report --runs=runs/leaderboard --out=experiments/leaderboard

The rivals read a context whole and compress it once (KVzip reads it twice), with the full cache held meanwhile; retention reads in chunks of 256, in bounded
memory. At 1,024 tokens 30 to 50 minutes a task of one question on 2 CPU cores, at 4,096 two to three hours.
"""

from ml_collections import ConfigDict

from configs import eval_needles
from retention import policies


def get_config() -> ConfigDict:
    config = eval_needles.get_config()
    config.tasks = ("needle", "needle4")
    config.samples = 64
    config.policies = tuple(name for name in policies.names() if name != "full")
    config.one_shot = tuple(name for name in config.policies if name != "retention")
    config.budgets = (0.5, 0.25, 0.125)
    return config
