"""Record a run's metrics, samples and pictures: in ``metrics.jsonl`` always, and in MLflow when it is on."""
