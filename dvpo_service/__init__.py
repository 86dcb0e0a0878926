"""DVPO: PPO with a distributional critic and asymmetric risk control (arXiv 2512.03847)."""

__version__ = "0.1.0"
