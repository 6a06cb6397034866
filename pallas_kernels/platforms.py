"""Which platform is being compiled for, and so which implementation of an operation is used."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in context, as in aot.py, else of jax's default device.

    Asked when an operation is traced: jax.lax.platform_dependent, which asks when it is lowered, would trace the kernels of all platforms every time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def choose(implementation: str | None, known: dict) -> str:
    """The implementation asked for, or the platform's own for None. Raises ValueError for one that is not known."""
    implementation = implementation or platform()
    if implementation not in known:
        raise ValueError(f"implementation is {implementation!r}: None and {', '.join(map(repr, known))} work")
    return implementation
