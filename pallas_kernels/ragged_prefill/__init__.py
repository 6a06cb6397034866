from pallas_kernels.ragged_prefill import reference, tpu
