"""Training: losses, optimizer, step, run directory, evaluation."""
