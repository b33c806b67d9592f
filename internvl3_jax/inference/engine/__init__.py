"""The engine: many requests at once, each with its own settings, in the rows of one cache."""
