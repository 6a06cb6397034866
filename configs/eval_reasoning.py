"""Eviction while the model thinks: GSM8K, MATH-500, AIME; budgets in tokens per stream, long answers.

    python -m experiments.evaluate --config=configs/eval_reasoning.py --workdir=runs/reasoning --config.data=DATA

DATA holds gsm8k_test.jsonl, math500.jsonl, aime24.jsonl, aime25.jsonl. Made for a reasoning model on an accelerator; SmolLM2-135M solves 0 of 50 problems of
GSM8K and 4 of 50 of MATH-500 with its full cache, in about 1.5 minutes each on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import eval_needles


def get_config() -> ConfigDict:
    config = eval_needles.get_config()
    config.tasks = ("gsm8k", "math500", "aime24", "aime25")
    config.samples = 30
    config.policies = ("retention", "rkv", "snapkv", "h2o", "window")
    config.budgets = (128, 256)
    config.prefill_chunk = 128  # tokens between evictions, as R-KV has them
    config.max_new_tokens = 512
    return config
