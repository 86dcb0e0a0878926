"""Ablation sweeps on Ray Tune: grids, trials, and the report that compares the arms."""
