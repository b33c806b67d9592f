"""Helpers that several test modules share: tiny models, released formats, data, processes."""
