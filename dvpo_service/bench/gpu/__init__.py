"""What ``scripts/gpu_check.py`` measures on one GPU. It needs torch, triton, transformers and pydantic alone."""
