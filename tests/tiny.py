"""A tiny random Llama in a Hugging Face folder, with a tokenizer and a chat template: what tests load where a user loads a model."""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retention.chat import ASK, SYSTEM, USER
from retention.checkpoints.huggingface import NAMES
from retention.training import text
from tests.conftest import small_config, small_model

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_folder(folder: pathlib.Path) -> pathlib.Path:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json of conftest's small model with 600 tokens into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The chat turns of training documents come first, often, so that they take few tokens.
    tokenizer.train_from_iterator([SYSTEM + USER + ASK] * 200 + text.load("pydoc")[:10], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))

    config = small_config(vocab_size=tokenizer.get_vocab_size(), tie_embeddings=True)
    entries = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(entries))
    params = small_model(config).params
    tensors = {NAMES[name]: np.asarray(params[name]) for name in ("embed", "norm")}
    for name, stacked in params["layers"].items():
        for layer in range(config.layers):
            # [out, in], as Hugging Face stores them
            tensors[NAMES["layers"][name].format(layer)] = np.ascontiguousarray(np.asarray(stacked[layer]).T)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
