"""Paired benchmarks: variants of one training step in turn on the same rows; whole commands on several GPUs.

Of steps `variants.py` names what there is, `runners.py` builds one, `measure.py` times them in rounds. Of
commands `scaling.py` does all of it. `tables.py` writes what was found. Other tools' recipes, which can be
entered beside ours, are in ``tests/benchmarks``.
"""
