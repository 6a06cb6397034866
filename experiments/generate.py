"""Continues a prompt under a budget, streaming: python -m experiments.generate --prompt="Once upon a time" --budget=256.

With --context=FILE the file's text is compressed first, before the prompt is seen.
"""

from absl import app, flags

import retention
from experiments import check_arguments
from retention.cache import SCOPES
from retention.generation import check_sampling
from retention.rows import check_budget
from retention.training import text

MODEL = flags.DEFINE_string("model", "smollm2-135m", "A model's name, a .gguf file or a Hugging Face folder.")
GATES = flags.DEFINE_string("gates", "auto", "'shipped', a gates file, or 'none'; auto: those shipped with the model, if any.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters, activations and cache.")
PROMPT = flags.DEFINE_string("prompt", None, "The text to continue, or with --chat the user's turn.")
CONTEXT = flags.DEFINE_string("context", None, "A text file to read before the prompt.")
CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.")
BUDGET = flags.DEFINE_string("budget", "256", "Tokens per stream (256), a fraction of the first text (0.125), or 'none' for the full cache.")
POLICY = flags.DEFINE_string("policy", "retention", f"One of {', '.join(retention.policies.names())}; options behind a colon, as in retention:floor=16.")
SCOPE = flags.DEFINE_enum("scope", None, SCOPES, "What competes for what; unset: as the policy has it.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "At most so many tokens.")
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 256, "Tokens between evictions; 0: one-shot prefill.", lower_bound=0)
SINKS = flags.DEFINE_integer("sinks", None, "Protected first positions; default: the policy's own.")
WINDOW = flags.DEFINE_integer("window", None, "Protected newest positions; default: the policy's own.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the fewest tokens that hold this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
flags.mark_flag_as_required("prompt")


def parse_budget(budget: str) -> int | float | None:
    if budget.lower() == "none":
        return None
    try:
        return float(budget) if "." in budget or "e" in budget.lower() else int(budget)
    except ValueError:
        raise ValueError(f"--budget must be a whole number, a fraction such as 0.125, or none, got {budget!r}") from None


def main(argv):
    check_arguments(argv)
    # What can be wrong is looked at before the model is loaded, which may take minutes.
    budget = parse_budget(BUDGET.value)
    check_budget(budget, sinks=0, window=0, floor=0)
    check_sampling(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value)
    policy, context = retention.policies.get(POLICY.value), text.read(CONTEXT.value) if CONTEXT.value else ""
    model = retention.load(MODEL.value, gates=GATES.value, dtype=DTYPE.value)
    session = retention.Session(
        model, budget, policy, SCOPE.value, PREFILL_CHUNK.value or None, SINKS.value, WINDOW.value
    )
    if context:
        session.append(context)
    for piece in session.stream(PROMPT.value, MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_P.value, SEED.value, CHAT.value):
        print(piece, end="", flush=True)
    print(f"\n[{session.stats}]")


if __name__ == "__main__":
    app.run(main)
