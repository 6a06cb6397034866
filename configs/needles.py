"""Held-out needles and prose: words, phrasings and haystack unseen in training; the question asked after the context is compressed.

python -m experiments.evaluate --config=configs/needles.py --workdir=runs/needles
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "smollm2-135m"
    config.gates = "shipped"
    config.dtype = "float32"
    config.text = "pydoc"  # the haystack: Python's own manual, in every CPython, never trained on
    config.seed = 0
    config.tasks = ("needle", "needle4", "facts")  # and "prose": KL to the full cache over the text that follows the context
    config.lengths = (1024, 4096)
    config.samples = 32
    config.policies = ("retention", "window", "random")
    config.kept = (0.25, 0.125, 0.0625, 0.03125)
    config.scope = "global"
    config.prefill_chunk = 256
    config.sinks = placeholder(int)  # unset: the policy's own
    config.continuation = 128  # tokens of prose scored behind the context
    config.max_new_tokens = 24
    return config
