"""Reads every row of a data set as training will, and names what is wrong."""
