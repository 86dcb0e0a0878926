"""Serving a trained policy with its value distributions: the parts that deploy.py puts on Ray Serve.

``gateway`` (HTTP) talks to ``policy`` (a vLLM engine) and ``values`` (the critic) through ``replicas``.
"""
