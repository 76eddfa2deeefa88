"""Balance while serving: what the experts' loads are expected to be, whether other places for them pay, what it brings.

Letters as in `placement`.
"""
