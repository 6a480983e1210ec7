"""A hand-written step in JAX: one program, compiled, with donated state."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree


def ranks(losses):
    """Centered ranks of losses."""
    order = jnp.argsort(jnp.argsort(losses))
    return order.astype(jnp.float32) / (losses.size - 1) - 0.5


def cross_entropy(logits, y):
    """Mean over examples, the last but one axis."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(-1)


def make_step(cell):
    """A step; it returns the loss of the mean."""
    x, y = map(jnp.asarray, cell.data())
    mean, unravel = ravel_pytree(cell.weights())
    adam = optax.adam(cell.learning_rate)
    pairs = cell.population_size // 2

    def loss(flat):
        h = x
        *hidden, last = unravel(flat)
        for kernel, bias in hidden:
            h = jax.nn.relu(h @ kernel + bias)
        return cross_entropy(h @ last[0] + last[1], y)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(mean, state, key):
        key, now = jax.random.split(key)
        z = jax.random.normal(now, (pairs, mean.size))
        plus = jax.vmap(lambda e: loss(mean + cell.stddev * e))(z)
        minus = jax.vmap(lambda e: loss(mean - cell.stddev * e))(z)
        u = ranks(jnp.concatenate([plus, minus]))
        gradient = (u[:pairs] - u[pairs:]) @ z / (2 * pairs)
        update, state = adam.update(gradient, state)
        return optax.apply_updates(mean, update), state, key, loss(mean)

    now = [mean, adam.init(mean), jax.random.key(0)]

    def run():
        *now[:], value = step(*now)
        return float(value)

    return run
