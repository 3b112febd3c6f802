"""Training steps: the parts behind `stopgrad_jax.train`."""
