"""Judging answers: critic, best of N, answer matching, preference pairs, process labels."""
