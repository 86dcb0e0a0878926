"""Scoring functions, pure and one a file, and the noise that can be put on them."""
