"""Long streams through caches that evict as they go: what the next tokens cost, against the full cache, as the stream grows.

    python -m experiments.stream --config=configs/stream.py:story --workdir=runs/story
    python -m experiments.stream --config=configs/stream.py:prose --workdir=runs/stream --config.text='heldout/*.txt'

story: the model is told a number, tells a story of 1,536 tokens with its full cache, and is asked for the number; the policies follow the same tokens. About
half an hour on 2 CPU cores. prose: 16,384 tokens of text, twice as many as SmolLM2 was trained for. About an hour.
"""

from ml_collections import ConfigDict

KINDS = ("story", "prose")


def get_config(kind: str = "story") -> ConfigDict:
    if kind not in KINDS:
        raise ValueError(f"configs/stream.py has the kinds story and prose, not {kind}; give --config=configs/stream.py:story")
    config = ConfigDict()
    config.model = "smollm2-135m"
    config.gates = "shipped"
    config.dtype = "float32"
    config.seed = 0
    config.kind = kind
    config.text = "pydoc"  # of prose
    config.samples = 8 if kind == "story" else 2
    config.tokens = 1536 if kind == "story" else 16384
    config.temperature = 0.7  # of the story
    config.policies = ("retention", "window", "h2o", "tova", "keydiff", "random")
    config.budgets = (64, 128, 256, 512)  # tokens per stream
    config.piece = 32  # tokens between two selections
    config.bins = 8  # of the plot
    return config
