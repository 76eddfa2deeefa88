"""How rows travel between ranks: one file a strategy."""
