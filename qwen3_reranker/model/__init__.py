"""The network: layers, attention, kernels, and how weights become one."""
