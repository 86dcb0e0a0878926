"""A whole run in one process, without Ray and vLLM: for small models and for debugging."""
