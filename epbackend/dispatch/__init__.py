"""How rows travel between ranks: one file a strategy, chosen in `choose.py`, on the contract of `base.py`."""
