"""Inference engines that epbackend plugs into: one package an engine."""
