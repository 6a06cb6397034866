"""KL to the full cache and next-token loss over 128 tokens of unseen prose behind a compressed context.

    python -m experiments.evaluate --config=configs/eval_prose.py --workdir=runs/prose --config.text='heldout/*.txt'

About 15 minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import eval_leaderboard


def get_config() -> ConfigDict:
    config = eval_leaderboard.get_config()
    config.tasks = ("prose",)
    config.lengths = (1024,)
    return config
