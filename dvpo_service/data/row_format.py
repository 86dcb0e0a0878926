"""``data.row_format``: load the user's function that turns a row into rows in a known format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dvpo_service.data.badrow import BadRow
from dvpo_service.errors import describe_error
from dvpo_service.registry import plugins

KEY = "data.row_format"
AUTO = "auto"

RowFormat = Callable[[object], list[object]]


def load_row_format(name: str) -> RowFormat:
    """Return a function that turns a file's row into rows for ``formats.parse_row``; ``auto`` leaves each row as it is.

    The returned function raises BadRow when the user's function raises, or returns something that is not a row.

    Raises:
      ConfigError: the user's function cannot be loaded, or takes other arguments.
    """
    if name == AUTO:
        return lambda row: [row]
    function = plugins.load(KEY, name)
    plugins.check_arguments(KEY, name, function, ("row",))

    def convert(row: object) -> list[object]:
        try:
            result = function(row)
        except Exception as error:
            raise BadRow("row format", f"{KEY} {name!r} raised {describe_error(error)}") from error
        rows = result if isinstance(result, list) else [] if result is None else [result]
        for converted in rows:
            if not isinstance(converted, Mapping):
                raise BadRow(
                    "row format",
                    f"{KEY} {name!r} returned {type(converted).__name__}; expected a dict, a list of them or None",
                )
        return rows

    return convert
