"""The rivals against kvpress's own code: which positions each stream of SmolLM2 keeps of 1,024 tokens. `pytest -m compare -s tests/test_kvpress.py`.

Where our defaults differ on purpose, the policy is made here with kvpress's.
"""

import json

import numpy as np
import pytest

import retention
from retention.chat import SYSTEM, USER
from retention.checkpoints import download
from retention.policies import ada_snapkv, expected_attention, keydiff, knorm, kvzip, lagkv, pyramidkv, snapkv, tova, window
from retention.rows import Rows
from retention.training import text

TOKENS = 1024

# name: our policy, kvpress's class and its arguments, the least overlap of all streams together.
RIVALS = {
    "window": (window.policy(sinks=4), "StreamingLLMPress", dict(n_sink=4), 0.99),
    "snapkv": (snapkv.policy(window=64, kernel=5), "SnapKVPress", dict(window_size=64, kernel_size=5), 0.99),
    "pyramidkv": (pyramidkv.policy(window=64, kernel=5, kvpress=True), "PyramidKVPress", dict(window_size=64, kernel_size=5, beta=20), 0.99),
    "ada_snapkv": (ada_snapkv.policy(window=64, kernel=5, floor=0.2), "AdaKVPress", dict(alpha_safeguard=0.2), 0.99),
    "tova": (tova.policy(), "TOVAPress", {}, 0.99),
    "knorm": (knorm.policy(), "KnormPress", {}, 0.99),
    "keydiff": (keydiff.policy(), "KeyDiffPress", {}, 0.99),
    "expected_attention": (expected_attention.policy(), "ExpectedAttentionPress", {}, 0.99),
    "lagkv": (lagkv.policy(), "LagKVPress", {}, 0.99),
    # kvpress reads the context again without the chat turn's opening, and so never sees it asked for.
    "kvzip": (kvzip.policy(), "KVzipPress", {}, 0.95),
}


@pytest.fixture(scope="module")
def ours():
    return retention.load("smollm2-135m", gates=None)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """The same weights in transformers, under a folder with the same tokenizer, which KVzip's press loads."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("kvpress")
    path = download.smollm2_135m()
    folder = tmp_path_factory.mktemp("smollm2")
    ours.tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": ours.tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.config.name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def tokens(ours):
    ids = ours.tokenizer.encode(SYSTEM + USER + " ".join(text.load("pydoc")))
    return ids[:TOKENS]


def read_by_kvpress(model, tokens, press=None):
    """The cache's keys of each layer, [H, n, D], and of each the positions that attention is to skip, None where nothing is."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
        else:
            with press(model):
                model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return [layer.keys[0].numpy() for layer in cache.layers], masked


def kept_by_kvpress(model, tokens, press):
    """[layer][head] positions. A press that gathers leaves the kept keys, which are found among all; one for heads of unlike lengths leaves a mask."""
    full, _ = read_by_kvpress(model, tokens)
    kept = []
    for layer, (keys, masked) in enumerate(zip(*read_by_kvpress(model, tokens, press), strict=True)):
        if masked is None:
            same = [(stream[:, None, :4] == full[layer][head][None, :, :4]).all(-1) for head, stream in enumerate(keys)]
            assert all((one.sum(axis=1) == 1).all() for one in same)
            kept.append([np.sort(one.argmax(axis=1)) for one in same])
        else:
            _, heads, positions = (np.asarray(index) for index in masked)
            kept.append([np.setdiff1d(np.arange(len(tokens)), positions[heads == head]) for head in range(len(full[layer]))])
    return kept


@pytest.mark.compare
@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("name", RIVALS)
def test_the_same_positions_stay(ours, theirs, tokens, name, share):
    import kvpress

    policy, press, arguments, least = RIVALS[name]
    if press == "AdaKVPress":
        arguments = {"press": kvpress.SnapKVPress(window_size=64, kernel_size=5), **arguments}
    press = getattr(kvpress, press)(**arguments)
    press.compression_ratio = 1 - share
    expected = kept_by_kvpress(theirs, tokens, press)
    rows = Rows(ours, 1, share, policy, prefill_chunk=None)
    rows.append([tokens])
    found = retention.cache.kept_positions(rows.cache, 0)
    counts = [(len(np.intersect1d(a, b)), len(a), len(b)) for layer, other in zip(found, expected, strict=True) for a, b in zip(layer, other, strict=True)]
    common, mine, yours = np.array(counts).T
    overlap, worst = common.sum() / yours.sum(), (common / np.maximum(yours, 1)).min()
    print(f"\n{name} at {share:.0%}: {overlap:.2%} of {yours.sum()} entries, {mine.sum()} here; the worst stream {worst:.1%}")
    assert abs(mine.sum() - yours.sum()) <= 1e-3 * yours.sum()
    assert overlap >= least
