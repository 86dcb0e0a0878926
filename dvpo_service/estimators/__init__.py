"""``algorithm.adv_estimator``: where advantages come from.

``dvpo``, ``gae`` and ``robust_gae`` are objectives of a critic pool; the others need no critic and are the
loop's ``Estimator`` by themselves. The equations are in ``dvpo_service/algo``.
"""

from dvpo_service.estimators.dvpo import DvpoObjective
from dvpo_service.estimators.gae import GaeObjective
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.estimators.objective import CriticObjective, Estimate, critic_objective, critic_spec

__all__ = [
    "CriticObjective",
    "DvpoObjective",
    "Estimate",
    "GaeObjective",
    "GroupEstimator",
    "critic_objective",
    "critic_spec",
]
