"""Objectives that processes import: what test_executors.py evaluates.

What a member does besides returning its loss depends on its weights: in a
generation of 32, some five have `chosen` weights.
"""

import os
import signal
import sys
import time

import numpy as np

LIMIT = 1.0  # seconds


def plain(weights):
    return float(np.sum((np.asarray(weights[0], float) - 1) ** 2))


def chosen(weights):
    return int(abs(np.asarray(weights[0]).flat[0]) * 1e6) % 8 == 0


def raises(weights):
    if chosen(weights):
        raise ArithmeticError("a member that fails")
    return plain(weights)


def exits(weights):
    if chosen(weights):
        sys.exit(2)
    return plain(weights)


def crashes(weights):
    if chosen(weights):
        os._exit(3)
    return plain(weights)


def hangs(weights):
    if chosen(weights):
        time.sleep(60 * LIMIT)
    return plain(weights)


def deaf(weights):
    """Of those that are chosen, some two."""
    return chosen(weights) and int(abs(weights[0].flat[1]) * 1e6) % 3 == 0


def hangs_deaf(weights):
    """No signal wakes it."""
    if deaf(weights):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600 * LIMIT)
    return plain(weights)


def says_nothing(weights):
    return None if chosen(weights) else plain(weights)


def undefined(weights):
    return float("nan") if chosen(weights) else plain(weights)


def always_fails(weights):
    raise KeyError("always")


def made(scale):
    """An objective that can't be pickled, and counts how often it is made."""
    made.count += 1
    return lambda weights: scale * plain(weights) + 1000 * (made.count > 1)


made.count = 0
