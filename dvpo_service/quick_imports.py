"""transformers without scikit-learn, which it imports for one function of assisted generation.

That import is a fifth of what a rank or an engine needs to start. Programs that use scikit-learn themselves are not
concerned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


class _NoScikitLearn(MetaPathFinder):
    """Finds nothing. It is asked before a module is imported, and then answers transformers' question."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "transformers.generation.candidate_generator":
            utils: Any = sys.modules["transformers.utils"]
            utils.is_sklearn_available = lambda: False


def install() -> None:
    """Have transformers, which is imported later, do without scikit-learn in this process. Idempotent."""
    if not any(isinstance(finder, _NoScikitLearn) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoScikitLearn())
