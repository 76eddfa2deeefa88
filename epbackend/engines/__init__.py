"""Inference engines that epbackend plugs into: one package an engine."""

RUN_VARIABLE = "EPBACKEND_RUN"
"""In the environment of `epbackend run`: its settings (JSON, only those that were given), for the servers of dp > 1."""
