"""Are latents useful? Classification and transfer against the baselines that they must beat."""
