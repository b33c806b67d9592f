"""Predicts memory use and a lower bound of the step time, without an accelerator.

python -m internvl3_jax.fit --config configs/sft.py:8b --topology v5e:16x16
"""
