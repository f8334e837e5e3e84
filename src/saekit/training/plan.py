"""What a distributed run needs: memory, bytes sent and time of a step, as formulas; the best mesh for given GPUs."""

from __future__ import annotations


def bytes_per_step(
    n_latents: int, d_in: int, k: int, batch_rows: int, data_size: int, latent_size: int, k_aux: int = 0
) -> float:
    """Return the bytes that one rank sends in a step of TopK (ring algorithms, fp32).

    Parameters
    ----------
    n_latents, d_in, k, batch_rows
        Of the SAE and of the step, on all ranks together.
    data_size, latent_size
        Ranks that split the rows, and ranks that split the latents.
    k_aux
        Dead latents per row in AuxK; 0 where none are dead.
    """
    n, d, rows = n_latents / latent_size, d_in, batch_rows / data_size
    over_latents, over_data = (latent_size - 1) / latent_size, (data_size - 1) / data_size
    candidates = 4 * rows * (k + k_aux) * (latent_size - 1)
    reconstructions = 8 * rows * d * over_latents * (2 if k_aux else 1)
    b_dec = 8 * (d + 1) * over_latents
    gradients = 8 * (2 * n * d + n + d) * over_data
    fired = 8 * n * over_data
    means = 8 * 2 * d * over_data if k_aux else 0
    return candidates + reconstructions + b_dec + gradients + fired + means
