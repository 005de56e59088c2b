"""How many tokens some operations take at a time. Imports nothing: memory is predicted from these."""

from __future__ import annotations

LOGIT_TOKENS = 1024
"""Rows of logits that exist at a time."""
SSD_TOKENS = 128
"""Of a state space: at 7B's sizes the least memory, as a token and head have Q decays, states PN / Q."""
FAST_SSD_TOKENS = 64
"""Of Triton's form, which keeps decays in registers."""
