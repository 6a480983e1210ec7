"""Noise of rank 1 in JAX, as of "Evolution Strategies at the Hyperscale".

arXiv 2511.16652: x (W + sigma a b^T) = x W + sigma (x a) b^T, and the gradient
as one product of the factors of all members.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax_full import cross_entropy, ranks


def make_step(cell):
    """A step; it returns the loss of the mean."""
    x, y = map(jnp.asarray, cell.data())
    mean = jax.tree.map(jnp.asarray, cell.weights())
    adam = optax.adam(cell.learning_rate)
    pairs, sigma = cell.population_size // 2, cell.stddev

    def logits(mean, noise, sign):
        h = x
        for i, (kernel, bias) in enumerate(mean):
            h_next = h @ kernel + bias
            if noise is not None:
                a, b, c = noise[i]
                h_next += sign * sigma * ((h @ a)[:, None] * b + c)
            h = jax.nn.relu(h_next) if i < len(mean) - 1 else h_next
        return h

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(mean, state, key):
        keys = jax.random.split(key, 3 * len(mean) + 1)
        noise = [
            (
                jax.random.normal(keys[3 * i + 1], (pairs, w.shape[0])),
                jax.random.normal(keys[3 * i + 2], (pairs, w.shape[1])),
                jax.random.normal(keys[3 * i + 3], (pairs, w.shape[1])),
            )
            for i, (w, _) in enumerate(mean)
        ]

        def losses(sign):
            return jax.vmap(lambda z: cross_entropy(logits(mean, z, sign), y))(
                noise
            )

        plus, minus = losses(1.0), losses(-1.0)
        u = ranks(jnp.concatenate([plus, minus]))
        u = (u[:pairs] - u[pairs:]) / (2 * pairs)
        gradient = [((a * u[:, None]).T @ b, u @ c) for a, b, c in noise]
        update, state = adam.update(gradient, state)
        value = cross_entropy(logits(mean, None, 0.0), y)
        return optax.apply_updates(mean, update), state, keys[0], value

    now = [mean, adam.init(mean), jax.random.key(0)]

    def run():
        *now[:], value = step(*now)
        return float(value)

    return run
