"""The named choices of the algorithm. The maths and the configuration both take them from here.

This module does not import torch, so that a config can be read without it.
"""

from __future__ import annotations

from typing import Literal

# The critic's loss (docs/algorithm.md, "Two forms").
LevelKind = Literal["endpoint", "midpoint"]
QrOver = Literal["ensemble", "heads"]
TailTarget = Literal["tail_mean", "pseudo_outcome", "bounded"]
TailSpread = Literal["variance", "bounded"]
ShiftOver = Literal["token", "batch", "batch_middle"]
Curvature = Literal["pointwise", "block"]
CriticTarget = Literal["gae", "mixture"]
HuberScale = Literal["absolute", "return_sd", "return_width"]

# The advantage of DVPO: which functional of the value distribution it compares.
AdvantageKind = Literal["mean", "huber", "cvar", "entropic"]
ClipScale = Literal["absolute", "return_width"]

# The policy's loss.
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
KlKind = Literal["k1", "k2", "k3"]
KlPlace = Literal["reward", "loss"]
BeyondCap = Literal["truncate", "mask"]

# Noise that can be added to rewards.
NoiseKind = Literal["none", "flip", "gaussian", "spike", "student_t", "majority_vote"]
SpikeSign = Literal["both", "up", "down"]
