"""Serve a trained policy together with the value distributions of its critic; deploy.py puts the parts on Ray Serve.

``gateway`` (HTTP) calls ``policy`` (a vLLM engine) and ``value_server`` (the critic) through ``replicas``.
"""
