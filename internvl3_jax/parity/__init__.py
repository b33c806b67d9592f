"""The parity pack: numbers of our model, and a runner that compares any engine with them.

python -m internvl3_jax.parity pack --output DIR           tiny models, images and goldens
python -m internvl3_jax.parity check DIR --engine ENGINE   compares, names the first stage

tiny_models.py, tiny_config.py, tiny_tokenizer.py   checkpoints with random weights
cases.py                                            what is asked
stages_run.py, faults.py, pack.py                   goldens, and what known faults would give
folder.py, compare.py, causes.py, check.py          the runner, which needs numpy alone
*_engine.py                                         the engines that it can run
"""
