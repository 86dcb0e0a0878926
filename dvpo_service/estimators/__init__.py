"""Advantage estimators: critic objectives (dvpo, gae, robust_gae) and group comparisons (grpo, rloo, ...).

``registry.estimators`` has their names and properties; the equations are in ``dvpo_service/algo``.
"""
