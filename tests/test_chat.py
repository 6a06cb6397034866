"""Texts in the markup become what each model's own chat template would write: the template itself is the oracle."""

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from retention import chat
from retention.chat import ASK, END, SYSTEM, USER
from retention.checkpoints import download
from retention.checkpoints.tokenizer import Tokenizer
from retention.evaluation import needles, ruler, streaming
from retention.training import sources, text

LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MODELS = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")),
    "qwen3": (QWEN3, "", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "mistral": (MISTRAL, "<s>", "</s>", ()),
}


def of_model(name, template=None):
    """A tokenizer of bytes with this model's special tokens and template."""
    own, bos, end, others = MODELS[name]
    bare = tokenizers.Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens([one for one in (bos, end, *others) if one])
    if bos:
        bare.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bare.token_to_id(bos))])
    return Tokenizer(bare, [bare.token_to_id(end)], bos, end, template or own)


def written(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def messages(conversation):
    """The turns of a text in the markup, and the beginning of the last answer."""
    found = []
    for turn in conversation.removeprefix(SYSTEM).split(USER)[1:]:
        asked, _, answer = turn.partition(ASK)
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer.removesuffix(END + "\n")}]
    return found[:-1], found[-1]["content"]


def conversations():
    """One question about a text, dialogues told and asked in turns, a story: each in the pieces in which it is fed."""
    texts = text.load("pydoc")

    def encode(piece):
        return [0] * (len(piece) // 4)

    [needle] = needles.samples("needle", encode, texts, 300, 1, 0)
    [keys] = ruler.samples("niah_multikey_1", encode, texts, 300, 1, 0)
    for sample in (needle, keys):
        yield [sample.context, sample.questions[0]]
    for task in ("needle_turns", "kv_turns"):
        [sample] = ruler.samples(task, encode, texts, 400, 1, 0)
        answered = [part for question in sample.questions for part in (question, f" It is 7.{END}")]
        yield [sample.context, *answered[:-1]]
    [story] = streaming.stories(1, 0)
    yield [story.context, "Once.", story.questions[0]]


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_is_what_the_chat_template_writes(name):
    tokenizer = of_model(name)
    encode = chat.encoder(tokenizer)
    lengths = []
    for parts in conversations():
        told, prefix = messages("".join(parts))
        lengths.append(len(told))
        ids = [token for i, part in enumerate(parts) for token in encode(part, bos=not i)]
        assert written(tokenizer, ids) == tokenizer.chat(told) + prefix
        assert not MODELS[name][1] or ids.count(ids[0]) == 1
    assert lengths == [1, 1, 15, 7, 3]


def test_the_markup_is_smollms_own_format():
    tokenizer = Tokenizer.from_gguf({key: field.contents() for key, field in gguf.GGUFReader(download.smollm2_135m()).fields.items()})
    assert tokenizer.turn() == (SYSTEM + USER, ASK) and tokenizer.between() == (ASK, END, "\n" + USER)
    encode = chat.encoder(tokenizer)
    for parts in conversations():
        assert [encode(part) for part in parts] == [tokenizer.encode(part, bos=False) for part in parts]


def test_a_generation_prompt_may_open_a_thought():
    """Answers of the past have none, in a dialogue and in training documents; the turn that is to be answered begins with it."""
    tokenizer = of_model("qwen3", QWEN3.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    [told] = ruler.samples("needle_turns", lambda piece: [0] * (len(piece) // 4), text.load("pydoc"), 400, 1, 0)
    assert "<think>" not in written(tokenizer, chat.encoder(tokenizer)(told.context + "".join(told.questions)))
    [story] = streaming.stories(1, 0)
    assert written(tokenizer, chat.encoder(tokenizer)(story.context)) == tokenizer.chat(messages(story.context)[0])
    document, _ = sources.Facts("pydoc", 2000, 0).document(0, tokenizer)
    assert "<think>" not in written(tokenizer, document)


@pytest.mark.parametrize("name", MODELS)
def test_training_documents_are_in_the_models_format(name):
    tokenizer, (_, bos, end, _) = of_model(name), MODELS[name]
    source, asked = sources.Facts("pydoc", 2000, 0), tokenizer.between()[0]
    for index in range(12):
        tokens, answer = source.document(index, tokenizer)
        whole = written(tokenizer, tokens)
        assert 1900 < len(tokens) <= 2000 and "<|im_start|>system" not in whole
        assert not bos or (whole.startswith(bos) and whole.count(bos) == 1), "whatever comes before the text"
        edges = np.flatnonzero(np.diff(answer.astype(int), prepend=0, append=0)).reshape(-1, 2)
        answers = [written(tokenizer, tokens[begin:stop]) for begin, stop in edges]
        assert 1 <= len(answers) <= 4 and whole.count(end) >= len(answers)
        for said, (begin, _) in zip(answers, edges, strict=True):
            assert said.count(end) == 1 and said.endswith(end) and written(tokenizer, tokens[:begin]).endswith(asked)


def test_names_of_special_tokens_are_left_out_of_the_text():
    tokenizer = of_model("llama3")
    assert written(tokenizer, chat.encoder(tokenizer)(f"a<|python_tag|>b<|eot_id|>c{END}")) == "abc<|eot_id|>"


def test_a_turn_may_begin_with_nothing():
    """No opening, and nothing between an answer's end and the next question: then nothing is written there, least of all the markup."""
    tokenizer = of_model("mistral", MISTRAL.replace("{{ bos_token }}", "").replace("[INST]", ""))
    assert tokenizer.turn()[0] == tokenizer.between()[2] == ""
    whole = f"{SYSTEM}{USER}Who came?{ASK}Nobody.{END}\n{USER}And then?{ASK}Ann"
    told, prefix = messages(whole)
    assert written(tokenizer, chat.encoder(tokenizer)(whole)) == tokenizer.chat(told) + prefix == "Who came?[/INST]Nobody.</s>And then?[/INST]Ann"


def test_a_template_may_say_what_we_do():
    """Words of its own, behind what was said, that stand in questions too."""
    tokenizer = of_model("qwen3", QWEN3.replace("<|im_end|>", " (the question, context or answer)<|im_end|>"))
    tail = " (the question, context or answer)<|im_end|>\n"
    assert tokenizer.turn() == ("<|im_start|>user\n", f"{tail}<|im_start|>assistant\n")
    assert tokenizer.between() == (f"{tail}<|im_start|>assistant\n", tail[:-1], "\n<|im_start|>user\n")


def test_a_model_that_shows_no_turns_is_refused():
    silent = of_model("qwen3")
    silent.chat_template = None
    with pytest.raises(ValueError, match="chat needs a chat template, and this model has none"):
        chat.encoder(silent)
    with pytest.raises(ValueError, match="puts ' .INST.' behind an answer, which holds none of the tokens that end a turn"):
        chat.encoder(of_model("mistral", MISTRAL.replace("{{ eos_token }}", " ")))
