"""Paired benchmarks: variants of one training step in turn, on the same rows, in one process.

`variants.py` names them, `runners.py` builds one, `measure.py` times them in rounds, `table.py` writes what
was found. `stock.py` and `litgpt.py` are the peers.
"""
