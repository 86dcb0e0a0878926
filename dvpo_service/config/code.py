"""``reward.code``: the limits of programs that the ``code`` reward runs."""

from __future__ import annotations

from dvpo_service.config.base import Positive, PositiveFloat, Section


class CodeConfig(Section):
    """Limits of one run of a program, which is one test, and how tests make a score.

    Attributes:
      cpu_s: processor seconds of each of its processes.
      wall_s: seconds by the clock.
      program_s: seconds by the clock for all tests of one program; tests that do not fit count as failed.
      memory_mib: of each of its processes, and of all together.
      processes: processes and threads at once.
      files_mib: what it can write, in memory or to one file.
      output_kib: what it can write to standard output, and to standard error.
      partial: the score is the share of tests passed; otherwise 1 where all pass, else 0.
    """

    cpu_s: Positive = 5
    wall_s: PositiveFloat = 15.0
    program_s: PositiveFloat = 60.0
    memory_mib: Positive = 512
    processes: Positive = 16
    files_mib: Positive = 16
    output_kib: Positive = 256
    partial: bool = False
