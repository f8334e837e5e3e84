"""Slow, obvious, dense losses. Everything is autograd on `[n, n_latents]` arrays; nothing is imported from saekit.

`u` are scaled rows (not centred), `p` holds leaves that require grad.
"""

import torch


def pre_of(p, u):
    return (u - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]


def mask_topk(pre, k):
    mask = torch.zeros_like(pre)
    for row in range(len(pre)):
        for latent in sorted(range(pre.shape[1]), key=lambda j: -float(pre[row, j]))[:k]:
            mask[row, latent] = 1.0
    return mask


def mask_batch(pre, count):
    flat = sorted(((float(v), i) for i, v in enumerate(pre.detach().flatten()) if v > 0), reverse=True)[:count]
    mask = torch.zeros(pre.numel())
    for _, place in flat:
        mask[place] = 1.0
    return mask.view_as(pre)


def error(u, u_hat):
    return ((u - u_hat) ** 2).sum(1).mean()


def variance(u):
    return ((u - u.mean(0)) ** 2).sum(1).mean().detach()


def aux(p, u, residual, dead, k_aux):
    """OpenAI's AuxK: residual detached, normalized by its variance, decoded without bias, dead latents only."""
    e = residual.detach()
    pre = pre_of(p, u)
    masked = torch.where(dead, pre, torch.tensor(-torch.inf))
    chosen = mask_topk(masked.detach(), min(k_aux, int(dead.sum())))
    codes = torch.where(dead, pre, torch.tensor(0.0)).relu() * chosen
    return error(e, codes @ p["W_dec"]) / variance(e)


def topk(p, u, *, k, multi=0.0, dead=None, k_aux=0, aux_coefficient=0.0):
    pre = pre_of(p, u)
    codes = pre.relu() * mask_topk(pre.detach(), k)
    u_hat = codes @ p["W_dec"] + p["b_dec"]
    loss = error(u, u_hat)
    if multi:
        wide = pre.relu() * mask_topk(pre.detach(), min(4 * k, pre.shape[1]))
        loss = loss + multi * error(u, wide @ p["W_dec"] + p["b_dec"])
    if dead is not None:
        loss = loss + aux_coefficient * variance(u) * aux(p, u, u - u_hat, dead, k_aux)
    return loss, codes


def batchtopk(p, u, *, k, dead=None, k_aux=0, aux_coefficient=0.0):
    pre = pre_of(p, u)
    codes = pre.relu() * mask_batch(pre, k * len(u))
    u_hat = codes @ p["W_dec"] + p["b_dec"]
    loss = error(u, u_hat)
    if dead is not None:
        loss = loss + aux_coefficient * variance(u) * aux(p, u, u - u_hat, dead, k_aux)
    return loss, codes


def hierarchical(p, u, *, levels, dead=None, k_aux=0, aux_coefficient=0.0):
    pre = pre_of(p, u)
    loss = 0.0
    for level in levels:
        codes = pre.relu() * mask_topk(pre.detach(), level)
        u_hat = codes @ p["W_dec"] + p["b_dec"]
        loss = loss + error(u, u_hat) / len(levels)
    if dead is not None:
        loss = loss + aux_coefficient * variance(u) * aux(p, u, u - u_hat, dead, k_aux)
    return loss, codes


def matryoshka(p, u, *, k_of, sizes, weights, over, truncated):
    pre = pre_of(p, u)
    n = pre.shape[1]
    choose = (
        (lambda part, k: mask_topk(part.detach(), k))
        if over == "topk"
        else (lambda part, k: mask_batch(part, k * len(u)))
    )
    full = pre.relu() * choose(pre, k_of(n))
    loss = 0.0
    for size, weight in zip(sizes, weights):
        codes = full[:, :size] if truncated else pre[:, :size].relu() * choose(pre[:, :size], k_of(size))
        loss = loss + weight * error(u, codes @ p["W_dec"][:size] + p["b_dec"])
    return loss, full


def relu(p, u, *, l1):
    codes = pre_of(p, u).relu()
    penalty = (codes * p["W_dec"].norm(dim=1)).sum(1).mean()
    return error(u, codes @ p["W_dec"] + p["b_dec"]) + l1 * penalty, codes


def p_anneal(p, u, *, coefficient, exponent, smooth=1e-3):
    codes = pre_of(p, u).relu()
    sizes = codes * p["W_dec"].norm(dim=1)
    penalty = ((sizes + smooth) ** exponent - smooth**exponent).sum(1).mean()
    return error(u, codes @ p["W_dec"] + p["b_dec"]) + coefficient * penalty, codes


def gated(p, u, *, l1):
    g = (u - p["b_dec"]) @ p["W_enc"].T
    gate = g + p["b_enc"]
    magnitude = (p["r_mag"].exp() * g + p["b_mag"]).relu()
    codes = (gate > 0).to(gate) * magnitude
    opened = gate.relu()
    penalty = (opened * p["W_dec"].norm(dim=1)).sum(1).mean()
    frozen = opened @ p["W_dec"].detach() + p["b_dec"].detach()
    return error(u, codes @ p["W_dec"] + p["b_dec"]) + l1 * penalty + error_of_gate(u, frozen), codes


def error_of_gate(u, u_hat):
    return error(u, u_hat)


def jumprelu_gradients(p, u, *, target, sparsity, bandwidth):
    """Loss and gradients by the formulas of 2407.14435, written out (a jump has no gradient for autograd to find)."""
    with torch.no_grad():
        n = len(u)
        theta = p["log_threshold"].exp()
        pre = pre_of(p, u)
        open_ = (pre > theta).to(pre)
        near = ((pre - theta).abs() < bandwidth / 2).to(pre)  # rectangle K((pre - theta) / bandwidth)
        codes = pre * open_
        residual = codes @ p["W_dec"] + p["b_dec"] - u
        l0 = open_.sum(1).mean()
        loss = (residual**2).sum(1).mean() + sparsity * variance(u) * (l0 / target - 1) ** 2
        d_hat = 2 * residual / n
        d_codes = d_hat @ p["W_dec"].T
        d_pre = d_codes * open_
        d_theta = (d_codes * near).sum(0) * -(theta / bandwidth)
        d_l0 = sparsity * variance(u) * 2 * (l0 / target - 1) / target
        d_theta = d_theta + d_l0 * -(near.sum(0) / n) / bandwidth
        gradients = {
            "W_dec": codes.T @ d_hat,
            "W_enc": d_pre.T @ (u - p["b_dec"]),
            "b_enc": d_pre.sum(0),
            "b_dec": d_hat.sum(0) - d_pre.sum(0) @ p["W_enc"],
            "log_threshold": d_theta * theta,
        }
        return loss, codes, gradients
