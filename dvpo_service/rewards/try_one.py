"""Score a row's own answer in a process of its own: ``python -m dvpo_service.rewards.try_one FUNCTION TIMEOUT_S``.

The answer is read from standard input, as JSON. The process exits with ``BROKEN``, and the reason as the last line of
standard error, when the function can score nothing. It runs as in a reward worker, in the main thread, so that a
function may use signals; what it loads, and a crash, stay in this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from dvpo_service.errors import UserError, describe_error
from dvpo_service.rewards.scoring import NotANumber, finite_number, resolve

BROKEN = 3


def main(function: str, timeout_s: str) -> None:
    """Score the answer, or end the process with a reason."""
    answer = json.load(sys.stdin)
    reason = broken(function, answer, float(timeout_s))
    if reason:
        print(reason, file=sys.stderr)
        sys.exit(BROKEN)


def broken(function: str, answer: str, timeout_s: float) -> str | None:
    """Return why ``function`` can score no response, or None.

    Errors that may come from this one answer do not count: a reward may raise, which costs the sample.
    """
    score = resolve(function)
    deadline = threading.Timer(timeout_s, _end, [f"no answer within reward.timeout_s = {timeout_s:g} s"])
    deadline.daemon = True
    deadline.start()
    try:
        finite_number(score(answer, answer))
    except (NameError, ImportError, NotANumber, UserError) as error:
        return describe_error(error)
    except Exception:  # noqa: BLE001 - user code may raise anything
        return None
    finally:
        deadline.cancel()
    return None


def _end(reason: str) -> None:
    """End the process from a thread, whatever its main thread does."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(BROKEN)


if __name__ == "__main__":
    main(*sys.argv[1:])
