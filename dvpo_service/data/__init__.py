"""Prompts: JSONL or Parquet rows to ``Prompt`` objects, and a cursor that can be saved."""
