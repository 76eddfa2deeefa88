"""What it should cost rows to travel between GPUs, computed from bytes and latencies: `python -m benchmarks.cost`."""
