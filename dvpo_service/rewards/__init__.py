"""Scoring functions, one per file and without side effects, and the noise that can be added to their scores."""
