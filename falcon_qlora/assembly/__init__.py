"""Putting a run together from the configuration, and writing down what it was: one file a stage.

``preflight`` (what is refused before anything large is read), ``rows`` (what the run trains on), ``trainer``
(the model, its adapter and the loop), ``record`` (what is written before and after).
"""
