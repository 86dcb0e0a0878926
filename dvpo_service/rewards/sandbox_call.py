"""Runs within a sandbox: calls a function of ``program.py`` with the arguments on standard input, writes its result.

Input is JSON, ``{"function": name, "arguments": [...]}``; output is the returned value as JSON. What the program prints
goes to standard error. A function that is not there is looked for in a class ``Solution``.
"""

import json
import os
import runpy
import sys


def main() -> None:
    """Call the function."""
    given = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        names = runpy.run_path("program.py", run_name="program")
        name = given["function"]
        function = names[name] if name in names else getattr(names["Solution"](), name)
        json.dump(function(*given["arguments"]), output)


if __name__ == "__main__":
    main()
