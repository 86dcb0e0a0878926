"""Where a run's numbers go: ``metrics.jsonl`` always, MLflow when it is on."""
