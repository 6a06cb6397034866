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


def encoder(tokenizer: Tokenizer, written: bool = False) -> Callable[..., list[int]]:
    """encode(text, bos=False): token ids of a text in the markup, whose turns the model's chat template writes, its own opening in the place of SYSTEM.

    An ASK at a text's end is the template's generation prompt, which may open a thought; one that an answer follows, all if they are `written`, is what
    stands before answers of the past. Other names of special tokens are left out of the text. bos: whether to begin with what the tokenizer puts there.
    Raises ValueError for a model without a chat template, or with one that does not show how an answer ends.
    """
    (opening, ask), (asked, end, again) = tokenizer.turn(), tokenizer.between()
    marks = {SYSTEM + USER: opening, ASK: asked, "\n" + USER: again, USER: again.lstrip(), END: end}
    turns = re.compile(f"({'|'.join(map(re.escape, marks))})")

    def encode(text: str, bos: bool = False) -> list[int]:
        open_turn = text.endswith(ASK) and not written
        parts = turns.split(text.removesuffix(ASK) if open_turn else text)
        return tokenizer.encode("".join(marks[part] if part in marks else tokenizer.plain(part) for part in parts) + (ask if open_turn else ""), bos=bos)

    return encode
