"""What a request may contain, and what its answer holds: checks, and what LMDeploy's own server does not know.

`patches/requests.py` and `patches/server.py` put these in their places.
"""
