"""The kernels of a CPU: `kernels` keeps the contract by the `products` that `choice` found to be the fastest here."""
