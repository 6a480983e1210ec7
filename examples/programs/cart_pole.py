#!/usr/bin/env python3
"""A simulator that knows nothing of keras_vo: weights in, a number out.

Reads the 31 weights of a controller (4 inputs, 5 hidden units, 1 output) from
its standard input, balances a pole on a cart for 10 seconds from each of four
starts, and prints the cost: 0 is a pole that stands still in the middle, 1
one that falls at once.

    echo 0 0 0 ... | python examples/programs/cart_pole.py

To try what is done about programs that fail, `--crash=P` ends it with that
probability by a signal, and `--hang=P` lets it wait for an hour.
"""

import argparse
import math
import os
import random
import signal
import sys
import time

INPUTS, HIDDEN = 4, 5
WEIGHTS = HIDDEN * (INPUTS + 1) + HIDDEN + 1
GRAVITY, CART, POLE, HALF_LENGTH, STEP = 9.8, 1.0, 0.1, 0.5, 0.02
STEPS = 500
STARTS = ((0.0, 0.1), (0.0, -0.1), (1.0, 0.05), (-1.0, -0.05))


def force(weights, state):
    """Of the controller, in newtons: a network with one hidden layer.

    The weights are those of two Dense layers: kernel, bias, kernel, bias.
    """
    kernel, rest = weights[: INPUTS * HIDDEN], weights[INPUTS * HIDDEN :]
    bias, kernel2, (bias2,) = (
        rest[:HIDDEN],
        rest[HIDDEN : 2 * HIDDEN],
        rest[2 * HIDDEN :],
    )
    output = bias2
    for unit in range(HIDDEN):
        total = bias[unit]
        for i, value in enumerate(state):
            total += value * kernel[i * HIDDEN + unit]
        output += math.tanh(total) * kernel2[unit]
    return 10 * math.tanh(output)


def cost(weights, position, angle):
    """Mean over the steps, 1 for those after the pole has fallen."""
    speed = turn = total = 0.0
    for step in range(STEPS):
        push = force(weights, (position, speed, 4 * angle, turn))
        sine, cosine = math.sin(angle), math.cos(angle)
        mass = CART + POLE
        pull = (push + POLE * HALF_LENGTH * turn**2 * sine) / mass
        angular = (GRAVITY * sine - cosine * pull) / (
            HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass)
        )
        acceleration = pull - POLE * HALF_LENGTH * angular * cosine / mass
        position += STEP * speed
        speed += STEP * acceleration
        angle += STEP * turn
        turn += STEP * angular
        if abs(position) > 2.4 or abs(angle) > 0.5:
            return (total + STEPS - step) / STEPS
        total += min(1.0, (position / 2.4) ** 2 + (angle / 0.5) ** 2) / 2
    return total / STEPS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--crash", type=float, default=0.0)
    parser.add_argument("--hang", type=float, default=0.0)
    arguments = parser.parse_args()
    weights = [float(word) for word in sys.stdin.read().split()]
    if len(weights) != WEIGHTS:
        sys.exit(f"Expected {WEIGHTS} weights. Received: {len(weights)}")
    luck = random.random()
    if luck < arguments.crash:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif luck < arguments.crash + arguments.hang:
        time.sleep(3600)
    costs = [cost(weights, *start) for start in STARTS]
    print(f"{sum(costs) / len(costs):.9g}")


if __name__ == "__main__":
    main()
