"""Measurements that the documentation quotes; each module has ``run() -> dict``."""

# The names that ``dvpo bench`` takes; the modules' names have underscores instead of hyphens.
NAMES = ("quantile-huber", "advantages", "critic-step", "memory")
