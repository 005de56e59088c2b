"""Falcon models: what they are, loading them quantized, and running packed documents through them."""
