"""Every kernel at real sizes through the compilers of five TPU generations and of an H100. `make aot` runs this where they are installed."""

import pytest

from pallas_kernels import aot, operations

REASON = next((reason for reason in map(aot.missing, aot.TARGETS) if reason), None)
pytestmark = [pytest.mark.aot, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

PROGRAMS = [program for name in operations.NAMES for program in operations.programs(name)]
# CI compiles one program of each operation for one TPU and the GPU; the table has the rest.
FIRST = {program.operation: program.label for program in reversed(PROGRAMS)}
CASES = [
    pytest.param(program, target, id=f"{program.operation}-{program.label}-{target}", marks=[] if fast else pytest.mark.slow)
    for program in PROGRAMS
    for target in aot.TARGETS
    if operations.fits(program, target)
    for fast in [FIRST[program.operation] == program.label and target in ("v5e", "h100")]
]


@pytest.mark.parametrize("program, target", CASES)
def test_compiles(program, target):
    result = operations.compile_program(program, target)
    assert ("tpu_custom_call" if target != "h100" else "triton") in result["hlo"], "no kernel in the program"
    x = program.arguments
    if program.operation == "ragged_decode":
        assert result["temp_bytes"] < x["buffer_keys"].size * x["buffer_keys"].dtype.itemsize / 8 + 16 * 2**20, "the cache is copied"
    if program.operation == "ragged_prefill":
        # The chunk in the kernel's order of axes, padded to whole lanes: queries, output, keys and values.
        rows = sum(times * x[name].size // x[name].shape[-1] for name, times in (("q", 2), ("k", 1), ("v", 1)))
        assert result["temp_bytes"] < 1.5 * rows * max(x["q"].shape[-1], 128) * x["q"].dtype.itemsize + 2**20, "the cache is copied"


def test_what_does_not_fit_fails_here():
    import jax
    import jax.numpy as jnp

    tokens = jax.ShapeDtypeStruct((1 << 18, 1 << 17), jnp.float32)
    with pytest.raises(Exception, match="(?i)memory|hbm"):
        aot.compile_for("v5e", lambda x: x @ x.T, tokens)
