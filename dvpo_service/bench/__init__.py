"""Measurements that the documentation quotes; each module has ``run() -> dict``."""

# As ``dvpo bench`` takes them; the module's name has underscores.
NAMES = ("quantile-huber", "advantages", "critic-step")
