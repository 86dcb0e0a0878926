"""Read a ``Config`` from YAML and dotted overrides, with errors that say what to change."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dvpo_service.config.layers import lay, lay_overrides
from dvpo_service.config.plain_yaml import NotYaml, read_yaml
from dvpo_service.config.schema import Config
from dvpo_service.config.spelling import as_meant, kind_of, value_of
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.host.secrets import mask, mask_override, names_secret


def shipped_configs() -> dict[str, Path]:
    """Return the file of every config that comes with the package, by name."""
    folder = Path(str(resources.files("dvpo_service"))) / "configs"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the validated config.

    Args:
      name_or_path: a shipped config's name, or the path of a YAML file. A file may start from another config with
        ``extends: NAME``.
      overrides: ``key.sub=value`` each, with the value in YAML; a later one wins.

    Raises:
      ConfigError: there is no such config, the YAML is not valid, a key is unknown (the message names the nearest known
        one), or a value has the wrong type. The message lists every problem that validation reports.
    """
    path = _find(name_or_path)
    tree = {"name": path.stem} | _read(path)
    tree = lay_overrides(tree, dict(map(_parsed, overrides)))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"config {name_or_path}: " + "; ".join(lines)) from error


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, which gives the same run again. Secrets are ``***`` (host/secrets.py)."""
    return yaml.safe_dump(mask(config.model_dump(mode="json")), sort_keys=False)


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the file's tree, merged over the config that it ``extends`` (a shipped name, or a path beside it)."""
    try:
        tree = as_meant(read_yaml(path.read_text(encoding="utf-8"), str(path)), Config)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {one_line(error, None)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, this is {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends names a shipped config or a file, this is {type(parent).__name__}")
    beside = path.parent / parent
    parent_path = beside if os.path.isfile(beside) else _find(parent)
    if parent_path.resolve() in (*below, path.resolve()):
        raise ConfigError(f"{path}: extends {parent!r}, which extends it again; break the circle")
    return lay(_read(parent_path, (*below, path.resolve())), tree)


def _find(name_or_path: str) -> Path:
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path):  # also False for a string that cannot be a file name
        return path
    close = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"no config {name_or_path!r}: neither a file nor a shipped name ({', '.join(shipped)}){hint}")


def _parsed(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = ".".join(part.strip() for part in key.split("."))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {mask_override(override)!r}: write it as key.sub=value")
    where = f"override {mask_override(override)!r}"
    try:
        return key, value_of(text, kind_of(Config, key), where)
    except NotYaml as error:
        comment = "; YAML reads ' #' as the start of a comment: put quotes around the text" if " #" in text else ""
        raise ConfigError(f"{where}: the value is not valid YAML{comment}") from error


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = list(known_keys())
        siblings = [k for k in known if k.rpartition(".")[0] == ".".join(location[:-1])]
        close = (
            difflib.get_close_matches(dotted, siblings, n=1)
            or [k for k in known if k.rpartition(".")[2] == location[-1]]
            or difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        )
        return f"unknown key {dotted!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{dotted}: missing, and it has no default"
    secret = names_secret(dotted) or location[-1:] == ["key_env"]  # a key that was put where its variable belongs
    hidden = isinstance(error["input"], dict | BaseModel) or secret
    given = "" if hidden else f" (got {mask(error['input'])!r})"
    return f"{dotted}: {message}{given}" if dotted else message


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterable[str]:
    """Yield every dotted key of the configuration, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")
