"""Training: configurations, losses, the one loop, dead-latent revival, checkpoints."""
