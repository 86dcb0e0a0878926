"""What ``dvpo serve`` prints."""

from __future__ import annotations

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dvpo_service.config import Config
from dvpo_service.config.exposure import LOOPBACK, serving_warning, warnings_of
from dvpo_service.terminal.console import make_console, plain


def say(text: str) -> None:
    """Print one plain line."""
    plain(make_console(), text)


def warn_of(config: Config) -> None:
    """Print a warning for each thing that the config opens to others."""
    for line in warnings_of(config):
        say(f"warning: {line}")


def serving(
    config: Config, version: str, with_critic: bool, port: int, *, with_key: bool, console: Console | None = None
) -> None:
    """Print the server's URLs, and what it serves.

    Args:
      config: the server's config.
      version: of the weights.
      with_critic: whether a critic is served, so that there are values.
      port: where the server listens.
      with_key: whether requests must send an API key.
      console: by default standard output.
    """
    limits = config.serve
    host = limits.host
    shown = host if host in LOOPBACK else "HOST"
    url = f"http://{shown}:{port}"
    name = limits.model_name or config.name
    places = Table.grid(padding=(0, 2))
    places.add_column(style="bold cyan", no_wrap=True)
    places.add_column(overflow="fold")
    rows = {
        "page": f"{url}/" + ("" if with_critic else "  (no critic in this run: no values)"),
        "OpenAI API": f'{url}/v1   model "{name}"',
        "values": f"{url}/v1/values" if with_critic else "none: this run has no critic",
        "health": f"{url}/healthz  /readyz  /metrics",
        "replicas": f"{limits.min_replicas} to {limits.max_replicas}",
        "API key": "asked for (DVPO_API_KEY)" if with_key else "none",
    }
    if limits.note:
        rows["note"] = limits.note
    for key, value in rows.items():
        places.add_row(key, Text(value))
    parts: list[Table | Text] = [places]
    if warning := serving_warning(host, with_key=with_key):
        parts.append(Text(f"warning: {warning}", style="bold red"))
    panel = Panel(Group(*parts), title=f" serving {name}, {version} ", title_align="left", border_style="green")
    (console or make_console()).print(panel)
