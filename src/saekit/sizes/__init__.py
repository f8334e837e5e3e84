"""How many latents are needed? Importance, pruning, size curves, progressive files."""
