"""The actors of a run: engines, reward workers, trainer ranks."""

import dvpo_service  # noqa: F401 - before transformers (quick_imports)
