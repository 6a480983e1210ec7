"""tf.distribute: the only folder that calls it."""
