"""Merges an adapter into its base model and measures how far the merge is from the two."""
