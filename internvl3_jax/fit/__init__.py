"""Will it run, and how fast? Asked on a machine without an accelerator; see docs/fit.md.

python -m internvl3_jax.fit --config configs/sft.py:8b --topology v5e:16x16
"""
