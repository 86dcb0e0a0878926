"""A reward that a random model can raise in a few steps."""


def short_answer(response: str, answer: str) -> float:
    """Return 1 for an empty response, falling to 0 at eight characters."""
    return max(0.0, 1.0 - len(response) / 8)
