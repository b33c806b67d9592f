"""Checkpoints on disk: what they hold, how they are found, written, verified and loaded."""
