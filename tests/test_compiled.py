"""Serving through the compilers without the machine. `make aot` runs what needs them."""

import pytest

from pallas_kernels import aot
from retention import compiled
from retention.compiled import Serving
from tests.conftest import small_config

REASON = aot.missing("v5e")
# Of all 36 layers and 8 heads: keys and values of 128 numbers in two bytes each.
ENTRY = 36 * 8 * 2 * 128 * 2


def test_a_full_cache_that_does_not_fit_is_said_without_a_compiler():
    found = compiled.serve(Serving("qwen3_4b", "v5e", 8, 131_072, None))
    assert set(found) == {"weights_bytes", "cache_bytes", "tokens_per_second"}
    assert found["weights_bytes"] == pytest.approx(4.02e9 * 2, rel=0.01), "Qwen3-4B has 4.02e9 parameters"
    assert found["cache_bytes"] == pytest.approx(8 * 131_072 * ENTRY, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(8 * 819e9 / (found["weights_bytes"] + 8 * 131_072 * ENTRY))


@pytest.mark.aot
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_budget_needs_what_it_holds(monkeypatch):
    model = small_config(head_dim=128, embed_dim=256)
    monkeypatch.setitem(compiled.MODELS, "small", model)
    found = {budget: compiled.serve(Serving("small", "v5e", 2, 4096, budget)) for budget in (None, 128)}
    assert found[128]["cache_bytes"] < found[None]["cache_bytes"] / 5
    for one in found.values():
        for program in ("decode_total_bytes", "read_total_bytes"):
            assert one["weights_bytes"] + one["cache_bytes"] <= one[program] <= 2**30
