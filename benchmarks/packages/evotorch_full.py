"""EvoTorch's PGPE (symmetric, centered ranks, Adam) on a vectorized problem."""

import logging

import torch
from evotorch import Problem
from evotorch.algorithms import PGPE
from torch.func import functional_call, vmap
from torch_full import network

logging.disable(logging.INFO)


def make_step(cell):
    """A step; it returns the loss of the mean."""
    x, y = map(torch.from_numpy, cell.data())
    y = y.long()
    net = network(cell)
    shapes = {k: w.shape for k, w in net.named_parameters()}
    sizes = [s.numel() for s in shapes.values()]
    start = torch.cat([w.reshape(-1) for w in net.parameters()])

    def loss(flat):
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        weights = {k: w.reshape(shape) for (k, shape), w in parts}
        logits = functional_call(net, weights, (x,))
        return torch.nn.functional.cross_entropy(logits, y)

    problem = Problem(
        "min",
        vmap(loss),
        solution_length=start.numel(),
        initial_bounds=(-1, 1),
        dtype=torch.float32,
        vectorized=True,
        seed=0,
    )
    search = PGPE(
        problem,
        popsize=cell.population_size,
        center_init=start,
        stdev_init=cell.stddev,
        center_learning_rate=cell.learning_rate,
        stdev_learning_rate=0.1,
        optimizer="adam",
        ranking_method="centered",
    )

    def step():
        search.step()
        with torch.no_grad():
            return loss(search.status["center"]).item()

    return step
