"""The baselines DVPO is compared with: advantages and a scalar critic's loss as pure functions, one file each.

Their advantages [B, T] are detached, not whitened, and 0 on masked tokens and on sequences that have no
valid token (a sample that failed to be scored); those do not count in any statistic either.
"""
