"""Variational optimization in NumPy, float64. Imports nothing of the package.

Written from the equations with plain loops over members and groups, so that it
shares no structure with what it checks.
"""

import math

import numpy as np


def identity(losses, antithetic=False):
    n = len(losses)
    utilities = np.empty(n)
    for i in range(n):
        left_out = {i, (i + n // 2) % n} if antithetic else {i}
        others = [losses[j] for j in range(n) if j not in left_out]
        utilities[i] = losses[i] - np.mean(others)
    return utilities


def standardize(losses):
    return (losses - np.mean(losses)) / np.std(losses)


def _tie_means(losses, by_rank):
    """by_rank[k] for the k-th lowest loss; equal losses get their mean."""
    order = np.argsort(losses, kind="stable")
    utilities = np.empty(len(losses))
    for value in set(losses):
        places = [k for k, i in enumerate(order) if losses[i] == value]
        for k in places:
            utilities[order[k]] = np.mean([by_rank[p] for p in places])
    return utilities


def centered_rank(losses):
    n = len(losses)
    return _tie_means(losses, [k / (n - 1) - 0.5 for k in range(n)])


def nes(losses):
    n = len(losses)
    raw = [max(0.0, math.log(n / 2 + 1) - math.log(k + 1)) for k in range(n)]
    return _tie_means(losses, [1.0 - n * w / sum(raw) for w in raw])


SHAPINGS = {
    "identity": identity,
    "standardize": standardize,
    "centered_rank": centered_rank,
    "nes": nes,
}


def members(noise, antithetic):
    return np.concatenate([noise, -noise]) if antithetic else noise


def gradients(z, utilities, sigma, groups, natural):
    """dU/dmu [d] and dU/dbeta [groups] from all members' noise z [N, d].

    `groups` lists, for each variance, the indices of the weights it rules.
    """
    n, d = z.shape
    grad_mu = np.zeros(d)
    for j in range(d):
        for i in range(n):
            grad_mu[j] += utilities[i] * z[i, j] / sigma[j] / n
        if natural:
            grad_mu[j] *= sigma[j] ** 2
    grad_beta = np.zeros(len(groups))
    for g, indices in enumerate(groups):
        for i in range(n):
            radius = sum(z[i, j] ** 2 for j in indices)
            grad_beta[g] += utilities[i] * (radius - len(indices)) / 2 / n
        if natural:
            grad_beta[g] /= len(indices) / 2
    return grad_mu, grad_beta


def kl_divergence(mean, sigma, new_mean, new_sigma):
    return sum(
        math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
        for m1, s1, m2, s2 in zip(mean, sigma, new_mean, new_sigma, strict=True)
    )


def search_step(
    f,
    mu,
    beta,
    noise,
    groups,
    *,
    shaping="centered_rank",
    natural=True,
    antithetic=True,
    rate=1.0,
    beta_rate=0.1,
):
    """One step with plain gradient descent on mu and beta."""
    sigma = np.empty(len(mu))
    for value, indices in zip(beta, groups, strict=True):
        sigma[list(indices)] = math.exp(value / 2)
    z = members(noise, antithetic)
    losses = np.array([f(mu + sigma * row) for row in z])
    if shaping == "identity":
        utilities = identity(losses, antithetic)
    else:
        utilities = SHAPINGS[shaping](losses)
    grad_mu, grad_beta = gradients(z, utilities, sigma, groups, natural)
    return mu - rate * grad_mu, beta - beta_rate * grad_beta
