"""keras_vo with noise of rank 1."""

import functools

from keras_vo_full import make_step as _make_step

make_step = functools.partial(_make_step, perturbation="low_rank")
