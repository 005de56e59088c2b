"""Ways to train a frozen model: one file each, see `interface`; their names are in `table`."""
