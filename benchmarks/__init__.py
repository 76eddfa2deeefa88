"""Measurements: `python -m benchmarks.NAME` prints a table, and writes NAME.json and NAME.png into results/."""
