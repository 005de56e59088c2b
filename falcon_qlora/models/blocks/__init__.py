"""Fast blocks: one file a family beside what they share. `models.fast_path` has the table of families."""
