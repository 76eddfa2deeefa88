"""The dispatchers `symmetric` and `deepep`."""
