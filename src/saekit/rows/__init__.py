"""Rows of activations: captured, streamed, in shards or arrays, synthetic, pooled."""
