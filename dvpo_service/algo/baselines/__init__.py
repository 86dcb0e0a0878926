"""The baselines DVPO is compared with: advantages and a scalar critic's loss as pure functions, one file each.

Their advantages [B, T] are detached and not whitened. They are 0 on masked tokens and on sequences without a valid
token (samples whose scoring failed); such tokens and sequences count in no statistic either.
"""
