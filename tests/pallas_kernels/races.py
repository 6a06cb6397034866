import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def none_found():
    """Gives what `interpret` takes to look for races, with NaN in uninitialised memory and copies done as late as they may be; asserts that there are none."""
    yield pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    assert not interpret_pallas_call.races.races_found
