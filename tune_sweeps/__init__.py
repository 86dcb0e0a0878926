"""Ablation sweeps on Ray Tune: grids, trials, and a page that answers the question."""
