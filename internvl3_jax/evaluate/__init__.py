"""Runs the benchmarks of the InternVL3 model card, and compares with its numbers.

    python -m internvl3_jax.evaluate --checkpoint DIR --data DIR --tasks mmstar,ai2d --output DIR

task_table.py says of each column of the card which file is read, how a question is asked and how
answers are scored; card.py has the published numbers. docs/evaluation.md is the user's page.
"""
