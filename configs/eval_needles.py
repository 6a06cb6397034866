"""Held-out needles and prose: words and phrasings unseen in training; the question asked after the context is compressed.

    python -m experiments.evaluate --config=configs/eval_needles.py --workdir=runs/needles --config.text='heldout/*.txt'

The haystack is whatever text is given. The default is at hand everywhere, but the shipped gates saw it in training, so quote figures on other prose.
About 70 minutes on 2 CPU cores for the task "needle" alone. A config of another file may begin with this one and say what is different.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "smollm2-135m"
    config.gates = "shipped"
    config.dtype = "float32"
    config.text = "pydoc"  # haystacks
    config.data = placeholder(str)  # the folder of benchmarks' files
    config.seed = 0
    config.tasks = ("needle", "needle4", "facts")  # and "prose": KL to the full cache over the text that follows the context
    config.lengths = (1024, 4096)
    config.samples = 32
    config.batch_size = 8  # sequences that run together
    config.policies = ("retention", "window", "random")
    config.baselines = True  # the full cache and the window of the same memory, whatever the policies
    config.scopes = ()  # none: each policy's own
    config.budgets = (0.25, 0.125, 0.0625, 0.03125)  # fractions of the context's tokens, or tokens per stream
    config.prefill_chunk = 256
    config.one_shot = ()  # policies that read the whole context first and compress it once
    config.question_seen = False  # whether the question is read with the context, and so known when it is compressed
    config.sinks = placeholder(int)  # unset: the policy's own
    config.window = placeholder(int)
    config.continuation = 128  # tokens of prose scored behind the context
    config.max_new_tokens = 24
    config.execute = False  # whether longproc_pseudo_to_code may run the programs that the model writes
    return config
