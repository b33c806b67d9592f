"""The rows of task_table.py, by group of the card."""
