"""Damages good inputs of every kind and watches what the programs do with them; see __main__.py."""
