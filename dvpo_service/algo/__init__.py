"""The algorithm as pure torch functions: no Ray, no configuration objects, no process groups.

Axes: ``B`` sequences, ``T`` response tokens, ``H`` heads, ``M`` quantiles, ``K`` target atoms.
Eq. n is equation n of arXiv 2512.03847.
"""
