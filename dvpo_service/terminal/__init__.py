"""Print what a person sees: the plan, progress bars, the live table, the closing panel.

On a terminal, tables and bars are redrawn in place. Elsewhere (CI, ``ray job logs``) the same numbers are printed as
plain lines, few enough to read. Colours follow NO_COLOR.
"""

from dvpo_service.terminal.closing import closing
from dvpo_service.terminal.console import make_console
from dvpo_service.terminal.plan import show_plan
from dvpo_service.terminal.progress import Bar, progress
from dvpo_service.terminal.serving import say, serving, warn_of
from dvpo_service.terminal.training import TrainingDisplay

__all__ = ["Bar", "TrainingDisplay", "closing", "make_console", "progress", "say", "serving", "show_plan", "warn_of"]
