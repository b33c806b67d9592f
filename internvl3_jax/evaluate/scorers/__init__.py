"""Scoring rules: pure functions from a text, as the model wrote it, to what it is worth.

"The kit" is VLMEvalKit, "the own code" the evaluation folder of the InternVL repository; a rule is
that of the program that made the card's number, its oddities included. Each function is tested with
results of the reference's function.
"""
