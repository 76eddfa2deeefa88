"""The server that clients see: `serve` runs it, `front` is what it shows them, `guard` its health and its end.

`reverse_proxy` is the one address of several engines, `experts` and `metrics` are what it says of the experts.
"""
