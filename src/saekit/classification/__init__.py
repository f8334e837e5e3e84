"""Are latents useful? Classification and transfer compared with baselines."""
