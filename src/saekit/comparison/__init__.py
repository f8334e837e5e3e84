"""Are latents real? What SAEs of several seeds share, and what only one of them has."""
