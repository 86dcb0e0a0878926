"""Prompts: reading JSONL or Parquet rows into ``Prompt`` objects, and a cursor whose position can be saved."""
