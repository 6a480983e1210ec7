"""Variational optimization in NumPy, float64. Imports nothing of the package.

Written from the equations with plain loops over members and groups, so that it
shares no structure with what it checks.
"""

import itertools
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


def following_step(
    f,
    mu,
    base,
    beta,
    average,
    noise,
    groups,
    blocks,
    *,
    few,
    most,
    natural=True,
    shaping="centered_rank",
    antithetic=True,
    rate=1.0,
):
    """One step where sigma follows the mean; plain descent on mu and beta.

    Blocks of at most `few` weights do not; others are raised to `most`.
    """
    z = members(noise, antithetic)
    sigma, size = np.empty(len(mu)), np.empty(len(mu))
    for g, indices in enumerate(groups):
        sigma[indices] = math.exp(beta[g] / 2)
        size[indices] = math.exp(base[g] / 2)
    losses = np.array([f(mu + sigma * row) for row in z])
    if shaping == "identity":
        utilities = identity(losses, antithetic)
        # As if the slope that members show were one over a noise of size s.
        step = size**2 / sigma * (utilities @ z) / len(z)
    else:
        utilities = SHAPINGS[shaping](losses)
        step = size * (utilities @ z) / len(z)
    regular, grad_beta = gradients(z, utilities, sigma, groups, False)
    if natural:
        _, grad_beta = gradients(z, utilities, sigma, groups, True)
    mu = mu - rate * (step if natural else regular)
    base = base - 0.1 * grad_beta
    beta = base.copy()
    for indices in blocks:
        own = [g for g, some in enumerate(groups) if set(some) <= set(indices)]
        sizes = [len(groups[g]) for g in own]
        floor = min(np.mean((mu - average)[indices] ** 2), most**2)
        lift = math.log(floor) - np.average(base[own], weights=sizes)
        if len(indices) > few and lift > 0:
            beta[own] += lift
    return mu, base, beta


def local_reparameterization(
    x,
    example_losses,
    layers,
    noise,
    *,
    full=None,
    shaping="identity",
    antithetic=True,
):
    """dU/dmu and dU/dbeta of every weight, one beta a weight.

    Members have noise on weights or on activations, not both.

    Args:
        x: inputs [batch, in].
        example_losses: from the last outputs [batch, units] to [batch].
        layers: (kernel, bias, kernel sigma, bias sigma, activation) each.
        noise: for each layer [draws, batch, units].
        full: for a first layer in weight space, the same five, and its kernel
            and bias noise [draws, ...]; None without one.
        shaping: applied over members with noise on weights. Those of the
            others have one scale, but with "identity" that of the losses.
        antithetic: whether the second half of the members mirrors the noise.

    Returns:
        The losses of both populations' members [N, batch], those with noise
        on weights first; and for each layer, the one in weight space first,
        (dU/dW, dU/db, dU/dbeta_W, dU/dbeta_b).
    """
    signs = (1, -1) if antithetic else (1,)

    def evaluate(n, sign, in_weights):
        """A member's losses, and its scores or its noise."""
        inputs, scores, full_noise = x, [], None
        if full:
            kernel, bias, kernel_sigma, bias_sigma, activation, zw, zb = full
            full_noise = sign * zw[n], sign * zb[n]
            if in_weights:
                kernel = kernel + kernel_sigma * full_noise[0]
                bias = bias + bias_sigma * full_noise[1]
            inputs = activation(x @ kernel + bias)
        for layer, xi in zip(layers, noise, strict=True):
            kernel, bias, kernel_sigma, bias_sigma, activation = layer
            m = inputs @ kernel + bias
            v = inputs**2 @ kernel_sigma**2 + bias_sigma**2
            scores.append((inputs, v, sign * xi[n]))
            z = m if in_weights else m + np.sqrt(v) * sign * xi[n]
            inputs = activation(z)
        return example_losses(inputs), scores, full_noise

    def population(in_weights):
        return [
            evaluate(n, sign, in_weights)
            for sign in signs
            for n in range(len(noise[0]))
        ]

    def shaped(values):
        if shaping == "identity":
            return identity(values, antithetic)
        return SHAPINGS[shaping](values)

    runs = population(in_weights=False)
    losses = np.array([run[0] for run in runs])
    count, batch = losses.shape
    utilities = np.stack(
        [identity(losses[:, b], antithetic) for b in range(batch)], 1
    )
    if shaping != "identity":
        utilities /= np.sqrt((utilities**2).mean())
    whole = population(in_weights=True) if full else []
    mean_utilities = (
        shaped(np.array([run[0].mean() for run in whole])) if full else []
    )
    all_losses = np.array([run[0] for run in [*whole, *runs]])
    gradients = []
    if full:
        parts = [np.zeros_like(a) for a in (*full[:2], *full[:2])]
        for u, (_, _, z) in zip(mean_utilities, whole, strict=True):
            for k in range(2):
                parts[k] += u * z[k] / full[2 + k] / count
                parts[2 + k] += u * (z[k] ** 2 - 1) / 2 / count
        gradients.append(parts)
    for index, layer in enumerate(layers):
        kernel, bias, kernel_sigma, bias_sigma, _ = layer
        parts = [np.zeros_like(a) for a in (kernel, bias, kernel, bias)]
        for n in range(count):
            a, v, xi = runs[n][1][index]
            for b in range(batch):
                for i in range(len(bias)):
                    u = utilities[n, b] / count / batch
                    dm = u * xi[b, i] / np.sqrt(v[b, i])
                    dv = u * (xi[b, i] ** 2 - 1) / (2 * v[b, i])
                    parts[0][:, i] += a[b] * dm
                    parts[1][i] += dm
                    parts[2][:, i] += a[b] ** 2 * dv * kernel_sigma[:, i] ** 2
                    parts[3][i] += dv * bias_sigma[i] ** 2
        gradients.append(parts)
    return all_losses, gradients


def split_half_snr(terms):
    """Signal over noise of the sum of `terms` [D, d], by all equal splits.

    <g1, g2> and |g1 - g2|^2 / 4 of the two halves' estimates of the sum, each
    averaged over all ways to take D / 2 of the D terms.
    """
    draws = len(terms)
    signal, noise = [], []
    for half in itertools.combinations(range(draws), draws // 2):
        other = [i for i in range(draws) if i not in half]
        g1 = 2 * np.sum(terms[list(half)], axis=0)
        g2 = 2 * np.sum(terms[other], axis=0)
        signal.append(np.sum(g1 * g2))
        noise.append(np.sum((g1 - g2) ** 2) / 4)
    return np.mean(signal) / np.mean(noise)
