"""Slots, the layer on one rank, devices, and the script of the docs."""
