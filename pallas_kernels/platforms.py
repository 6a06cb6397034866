"""Which platform is being compiled for."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in context, as in aot.py, else of jax's default device.

    Asked when an operation is traced: jax.lax.platform_dependent, which asks when it is lowered, would trace the kernels of all platforms every time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()
