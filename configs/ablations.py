"""What the gates owe to each part of their training: the first stage, shortened, with one thing changed at a time.

    python -m experiments.ablate --config=configs/ablations.py --workdir=runs/ablations \
      --config.train.data.text='texts/*.txt' --config.evaluate.text='heldout/*.txt'

All variants take the same steps over the same documents. Some 20 minutes a variant and seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import eval_needles, smollm2_135m


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.train = smollm2_135m.get_config("short")
    config.train.steps = 200
    config.seeds = (0, 1, 2)
    # What each variant changes of `train`.
    config.variants = ConfigDict()
    config.variants.baseline = ConfigDict()
    config.variants.local = ConfigDict({"gate": {"kind": "local"}})
    config.variants.linear = ConfigDict({"gate": {"kind": "linear"}})
    config.variants.no_capacity = ConfigDict({"loss": {"capacity": 0.0}})
    config.variants.no_kl = ConfigDict({"loss": {"kl": 0.0, "other_kl": 0.0}})
    config.variants.no_answer_kl = ConfigDict({"loss": {"kl": 0.0}})  # answers are taught by what is true alone
    config.variants.no_ntp = ConfigDict({"loss": {"ntp": 0.0}})
    config.variants.bias_0 = ConfigDict({"gate": {"bias": 0.0}})
    config.variants.tie_heads = ConfigDict({"gate": {"tie_heads": True}})
    # Budgets in training around one of those that the evaluation uses, or above both, in place of 3 to 25 %.
    config.variants.budgets_6 = ConfigDict({"loss": {"budget_low": 0.05, "budget_high": 0.075}})
    config.variants.budgets_25 = ConfigDict({"loss": {"budget_low": 0.2, "budget_high": 0.25}})
    # Those to run.
    config.order = ("baseline", "local", "no_capacity", "no_kl", "no_answer_kl", "no_ntp", "linear", "bias_0", "tie_heads", "budgets_6", "budgets_25")
    # Each with the gates that a variant has come to; local ones under the budget of a stream that they were trained for.
    config.evaluate = eval_needles.get_config()
    config.evaluate.model, config.evaluate.dtype = config.train.get_ref("model"), config.train.get_ref("dtype")
    config.evaluate.tasks = ("needle", "prose")
    config.evaluate.lengths = (1024,)
    config.evaluate.policies = ("retention",)
    config.evaluate.baselines = False  # they are the same for all variants
    config.evaluate.batch_size = 16
    config.evaluate.budgets = (0.125, 0.0625)
    return config
