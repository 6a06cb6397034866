"""RULER's tasks that need no file, and two of several turns (retention/evaluation/ruler.py): which of them a model can do, and what eviction costs.

    python -m experiments.evaluate --config=configs/eval_ruler.py --workdir=runs/ruler --config.text='heldout/*.txt'

About 6 minutes a task and 1,024 tokens on 2 CPU cores. SmolLM2-135M answers few of them even with its full cache.
"""

from ml_collections import ConfigDict

from configs import eval_needles
from retention.evaluation import ruler


def get_config() -> ConfigDict:
    config = eval_needles.get_config()
    config.tasks = tuple(task for task in ruler.TASKS if task not in ruler.QA)
    config.lengths = (1024,)
    config.samples = 16
    config.policies = ("retention", "snapkv", "window")
    config.one_shot = ("snapkv",)
    config.budgets = (0.25, 0.125)
    config.max_new_tokens = 64
    return config
