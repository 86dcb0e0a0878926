"""DVPO: PPO with a distributional critic and asymmetric risk control (arXiv 2512.03847)."""

from dvpo_service.quick_imports import install

__version__ = "0.1.0"
install()
