"""What the experts of all ranks did: counted by `stats_writer` in each, read as a `report`, saved by `recording`."""
