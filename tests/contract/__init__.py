"""What every device must keep: the same tests on each. A device that cannot be used here skips with its reason."""
