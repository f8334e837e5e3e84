"""Exact one-to-one matching of latents with a proof of optimality, never holding all cosines."""
