"""``data.row_format``: the user's own function from a row to rows in a known format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dvpo_service.data.badrow import BadRow
from dvpo_service.errors import describe_error
from dvpo_service.registry import plugins

KEY = "data.row_format"
AUTO = "auto"

RowFormat = Callable[[object], list[object]]


def load_row_format(name: str) -> RowFormat:
    """Return a function from a file's row to rows for ``formats.parse_row``; ``auto`` gives each row as it is.

    The function raises BadRow where the user's own raises, or returns no row.

    Raises:
      ConfigError: the user's function is not there, or takes other arguments.
    """
    if name == AUTO:
        return lambda row: [row]
    function = plugins.load(KEY, name)
    plugins.check_arguments(KEY, name, function, ("row",))

    def convert(row: object) -> list[object]:
        try:
            made = function(row)
        except Exception as error:
            raise BadRow("row format", f"{KEY} {name!r} raised {describe_error(error)}") from error
        rows = made if isinstance(made, list) else [] if made is None else [made]
        for one in rows:
            if not isinstance(one, Mapping):
                raise BadRow(
                    "row format",
                    f"{KEY} {name!r} returned {type(one).__name__}; expected a dict, a list of them or None",
                )
        return rows

    return convert
