"""Reward functions that misbehave."""

import os
import time


def troublesome(response: str, answer: str) -> float:
    if response == "hang":
        time.sleep(3600)
    if response == "die":
        os._exit(1)
    if response == "eat":
        return float(len(bytearray(8 * 2**30)))
    if response == "raise":
        return 1 / 0
    return float(response == answer)
