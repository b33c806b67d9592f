"""Damages valid inputs of every kind and judges how the programs handle them; see __main__.py."""
