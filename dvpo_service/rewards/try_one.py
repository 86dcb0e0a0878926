"""Score a row's own answer in a process of its own: ``python -m dvpo_service.rewards.try_one``.

Standard input is JSON: the ``reward`` section, the number of the ``part`` to try, and the fields of a ``Work``. The
process exits with ``BROKEN``, and the reason as the last line of standard error, when the reward can score nothing. It
runs as in a reward worker, in the main thread, so that a function may use signals; what it loads, and a crash, stay in
this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from dvpo_service.config import RewardConfig
from dvpo_service.errors import UserError, describe_error
from dvpo_service.host.secrets import mask_text
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.parts import load_part
from dvpo_service.rewards.scoring import NotANumber

BROKEN = 3


def main() -> None:
    """Score the answer, or end the process with a reason."""
    given: dict[str, Any] = json.load(sys.stdin)
    config = RewardConfig.model_validate(given["reward"])
    reason = broken(config, given["part"], Work(**given["work"]))
    if reason:
        print(mask_text(reason), file=sys.stderr)
        sys.exit(BROKEN)


def broken(config: RewardConfig, number: int, work: Work) -> str | None:
    """Return why the reward can score no response, or None.

    Errors that may come from this one answer do not count: a reward may raise, which costs the sample.
    """
    part = config.parts[number]
    loaded = load_part(config, part)
    timeout_s = config.timeout_of(part)
    deadline = threading.Timer(timeout_s, _end, [f"no answer within reward.timeout_s = {timeout_s:g} s"])
    deadline.daemon = True
    deadline.start()
    try:
        loaded.attempt(work)
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
    main()
