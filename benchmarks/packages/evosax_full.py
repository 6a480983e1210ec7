"""evosax's Open_ES, ask and tell in one compiled program."""

import functools

import jax
import jax.numpy as jnp
import optax
from evosax.algorithms import Open_ES
from jax_full import cross_entropy


def make_step(cell):
    """A step; it returns the loss of the mean."""
    x, y = map(jnp.asarray, cell.data())
    weights = jax.tree.map(jnp.asarray, cell.weights())
    es = Open_ES(
        population_size=cell.population_size,
        solution=weights,
        optimizer=optax.adam(cell.learning_rate),
        std_schedule=optax.constant_schedule(cell.stddev),
    )
    params = es.default_params

    def loss(weights):
        h = x
        for kernel, bias in weights[:-1]:
            h = jax.nn.relu(h @ kernel + bias)
        return cross_entropy(h @ weights[-1][0] + weights[-1][1], y)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, key):
        key, ask, tell = jax.random.split(key, 3)
        population, state = es.ask(ask, state, params)
        fitness = jax.vmap(loss)(population)
        state, _ = es.tell(tell, population, fitness, state, params)
        return state, key, loss(es.get_mean(state))

    now = [es.init(jax.random.key(1), weights, params), jax.random.key(0)]

    def run():
        *now[:], value = step(*now)
        return float(value)

    return run
