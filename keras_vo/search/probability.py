"""TensorFlow Probability, imported where it is first needed.

Its import takes a quarter of the time of TensorFlow's and Keras's, and 50 MiB
(benchmarks/results/memory.md). A search that neither bounds nor shows a
divergence, and draws by the newest generator, never needs it.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["distributions"]


def distributions() -> Any:
    """`tfp.distributions`."""
    with tf.init_scope():  # else its constants were those of a step's graph
        import tensorflow_probability as tfp

        dir(tfp.distributions)  # which is lazy itself
    return tfp.distributions
