"""What a latent means, and what it does: contexts, labels with scores, edits of a running model and their effect."""
