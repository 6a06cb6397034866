"""Global gates for Qwen3-4B in the papers' settings: "math" (M = 128, 32K tokens) or "instruct" (M = 512, 128K tokens).

Method and settings: arXiv 2605.09649 (DBTrimKV); arXiv 2512.03324 (TRIM-KV) for the math data. Expected, as published: AIME24 70 at M=1024 against 65.5 with
the full cache, MATH-500 91 at M=512 against 92.5 (both read off a chart); instruct, LongBench-V2 9.2 % better than the full cache. Theirs took 4 to 8 GPUs
of the H100 class. Ours has not run: no such machine was there.
Hardware: math fits 16 TPU v5e (16 GB each) or 4 v5p; instruct 64 v5p: compiled for these, see `python -m experiments.aot --suite=training`.
Hours, by the FLOP count of retention.training.metrics and a guess of 40 % of peak: math 2.3 on 16 v5e, instruct 5.5 on 64 v5p.

    python -m experiments.train_gates --config=configs/qwen3_4b.py:math --workdir=runs/qwen3_4b --distributed \
      --config.model=/models/Qwen3-4B --config.data.sources.math.path='/data/OpenR1-Math-220k/*.parquet'
    python -m experiments.train_gates --config=configs/qwen3_4b.py:instruct --workdir=runs/qwen3_4b_instruct --distributed \
      --config.model=/models/Qwen3-4B-Instruct-2507 --config.data.sources.long.path='/data/LongAlpaca.jsonl' \
      --config.data.sources.books.path='/data/books/*.txt'
"""

from ml_collections import ConfigDict


def get_config(data: str = "math") -> ConfigDict:
    if data not in ("math", "instruct"):
        raise ValueError(f"the data after the config file's name must be 'math' or 'instruct', got {data!r}")
    math = data == "math"
    config = ConfigDict()
    config.model = "/models/Qwen3-4B"
    config.dtype = "bfloat16"
    config.seed = 0
    config.steps = 1000
    config.checkpoint_every = 50
    config.keep_checkpoints = 3
    config.start_from = ""
    config.init_from_data = False  # the papers' N(0, 0.02)
    # The frozen weights lie over fsdp; a row of 32K tokens lies on 4 chips, one of 128K on 8. -1: as many as there are.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "context": 4 if math else 8})

    config.gate = ConfigDict()
    config.gate.kind = "global"
    config.gate.width = 512
    config.gate.tie_heads = False
    config.gate.bias = 18.0  # starts as the full cache
    config.gate.sinks = 0  # none are protected in the papers

    config.data = ConfigDict()
    config.data.batch_size = 4 if math else 8
    config.data.length = 32_768 if math else 131_072
    config.data.others = 0 if math else 4096  # assistant tokens are what is labelled; books have none
    config.data.workers = 1
    config.data.max_chars = 2_000_000
    config.data.packing_bins = 8
    config.data.sources = ConfigDict()
    if math:
        config.data.sources.math = ConfigDict({"kind": "records", "path": "/data/OpenR1-Math-220k/*.parquet", "weight": 1.0})
    else:
        config.data.sources.long = ConfigDict({"kind": "records", "path": "/data/LongAlpaca.jsonl", "weight": 0.5})
        config.data.sources.books = ConfigDict({"kind": "text", "path": "/data/books/*.txt", "weight": 0.5})

    config.loss = ConfigDict()
    config.loss.kl = 1.0
    config.loss.ntp = 1.0
    config.loss.other_kl = 1.0
    config.loss.capacity = 1.0
    config.loss.budget_low = config.loss.budget_high = 128.0 if math else 512.0  # above 1: tokens
    config.loss.remat = True

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 5e-3  # 1e-6
    config.optimizer.clip_norm = 1.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-10  # from a bias of 18 the first gradients are about 1e-6 in norm
    config.optimizer.weight_decay = 1e-2
    return config
