"""The threshold above which latents count as the same, for every question."""

THRESHOLD = 0.7
"""Cosine that both sides of a shared latent must exceed (2501.16615)."""
