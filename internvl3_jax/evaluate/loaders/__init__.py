"""Readers of the benchmarks' files. Nothing is downloaded; a wrong or partial file is an error that
names the row and the column.

Each loader of LOADERS takes (task, data directory) and returns `Loaded`.
"""
