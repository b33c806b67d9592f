"""From images, videos and messages to numpy batches. Nothing in this package imports jax."""
