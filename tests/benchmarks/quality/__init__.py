"""The quality gate: whether the fast path trains what the stock path trains. Run ``__main__``."""
