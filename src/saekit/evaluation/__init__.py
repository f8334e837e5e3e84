"""Is an SAE faithful? Reconstruction, sparsity, redundancy and what it costs the model."""
