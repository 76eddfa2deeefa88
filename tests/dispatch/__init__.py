"""How rows travel: plans, bytes, choices and failures, on the CPU."""
