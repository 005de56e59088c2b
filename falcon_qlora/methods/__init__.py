"""Ways to train a frozen model: one file each."""
