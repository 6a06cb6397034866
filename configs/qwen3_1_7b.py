"""Global gates for Qwen3-1.7B in the papers' settings: "math" (M = 128) or "instruct" (M = 512), rows of 32K tokens.

Method and settings: arXiv 2605.09649 (DBTrimKV); arXiv 2512.03324 (TRIM-KV) for the math data. Expected: nothing published for this size that we know of; of
Qwen3-4B see qwen3_4b.py, from which all but the model is taken. Ours has not run: no such machine was there.
The papers' 128K tokens for instruct are more than the 40,960 positions that this model knows without YaRN.
Hardware: 16 TPU v5e or 4 v5p: it needs less than the 4B model, which was compiled for these.
Hours, by the FLOP count of retention.training.metrics and a guess of 40 % of peak: 0.9 on 16 v5e.

    python -m experiments.train_gates --config=configs/qwen3_1_7b.py:math --workdir=runs/qwen3_1_7b --distributed \
      --config.model=/models/Qwen3-1.7B --config.data.sources.math.path='/data/OpenR1-Math-220k/*.parquet'
"""

from ml_collections import ConfigDict

from configs import qwen3_4b


def get_config(data: str = "math") -> ConfigDict:
    config = qwen3_4b.get_config(data)
    config.model = "/models/Qwen3-1.7B"
    config.data.length, config.data.batch_size, config.mesh.context = 32_768, 4, 4
    return config
