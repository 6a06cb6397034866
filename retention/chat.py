"""Turns in the texts of tasks and of synthetic training documents: written in one markup, that of ChatML, and read by each model in its own.

A conversation is SYSTEM + USER + question + ASK + answer + END + "\\n" + USER + question + ASK + ...
"""

import re
from collections.abc import Callable

from retention.checkpoints.tokenizer import Tokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER = "<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


def encoder(tokenizer: Tokenizer) -> Callable[..., list[int]]:
    """encode(text, bos=False): token ids of a text in the markup, whose turns the model's chat template writes, its own opening in the place of SYSTEM.

    Other names of special tokens are left out of the text. bos: whether to begin with what the tokenizer puts before a text.
    Raises ValueError for a model without a chat template, or with one that does not show how an answer ends.
    """
    (opening, ask), (end, again) = tokenizer.turn, tokenizer.between
    marks = {SYSTEM + USER: opening, ASK: ask, "\n" + USER: again, USER: again.lstrip(), END: end}
    found = re.compile("|".join(re.escape(mark) for mark in (*marks, *sorted(tokenizer.special_tokens, key=len, reverse=True))))
    return lambda text, bos=False: tokenizer.encode(found.sub(lambda match: marks.get(match[0], ""), text), bos=bos)
