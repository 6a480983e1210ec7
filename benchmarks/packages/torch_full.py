"""A hand-written step in PyTorch: `torch.func.vmap` over members."""

import torch
from torch.func import functional_call, vmap


def network(cell):
    """The cell's, with its weights."""
    layers = []
    for kernel, bias in cell.weights():
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data = torch.tensor(kernel.T).contiguous()
        layer.bias.data = torch.tensor(bias)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).requires_grad_(False)


def make_step(cell):
    """A step; it returns the loss of the mean."""
    x, y = map(torch.from_numpy, cell.data())
    y = y.long()
    torch.manual_seed(0)
    net = network(cell)
    mean = dict(net.named_parameters())
    adam = torch.optim.Adam(mean.values(), cell.learning_rate)
    pairs, sigma = cell.population_size // 2, cell.stddev

    def loss(weights):
        logits = functional_call(net, weights, (x,))
        return torch.nn.functional.cross_entropy(logits, y)

    losses = vmap(loss)

    @torch.no_grad()
    def step():
        noise = {k: torch.randn(pairs, *w.shape) for k, w in mean.items()}
        plus, minus = (
            losses({k: mean[k] + s * z for k, z in noise.items()})
            for s in (sigma, -sigma)
        )
        ranks = torch.cat([plus, minus]).argsort().argsort().float()
        u = ranks / (2 * pairs - 1) - 0.5
        u = (u[:pairs] - u[pairs:]) / (2 * pairs)
        for k, z in noise.items():
            mean[k].grad = torch.tensordot(u, z, 1)
        adam.step()
        return loss(mean).item()

    return step
