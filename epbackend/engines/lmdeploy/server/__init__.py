"""The server that clients see: `serve` runs it, `front` is what it shows them, `guard` its health and its end.

`reverse_proxy` is the one address of several engines, `answers` the form of what these say themselves.
"""
