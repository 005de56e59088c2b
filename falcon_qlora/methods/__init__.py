"""Ways to train a model: one file each, see `interface`; their names are in `table`."""
