"""How rows travel between ranks: one file for each dispatcher, chosen in `choose.py`, on the contract of `base.py`.

Letters of shapes: T tokens of this rank, N tokens that it works on (its own and received), D hidden size, K choices of
a token (top-k), R ranks, G sources (groups of ranks with the same tokens), L slots of one rank, P = R * L slots of all
ranks, E logical experts, S rows, one for each choice that is computed here, B bytes of an encoded row. Here alone: C
rows of a receive buffer, M rows to send in `alltoall`, X whatever else a tensor has.
"""
