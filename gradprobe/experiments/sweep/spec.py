"""Spec files: all settings that decide the numbers of a sweep, as TOML or as stored with the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from gradprobe.errors import ArgumentError, StoreError, not_among
from gradprobe.experiments.sweep.store import open_run

_SQLITE = b"SQLite format 3\0"


class Settings(TypedDict, total=False):
    """The settings of a sweep, as `gradprobe.experiments.sweep.run.plan` takes and explains them."""

    data: str
    image_size: int | None
    per_class: int | None
    augment: bool | None
    families: Sequence[str] | None
    models: Sequence[str]
    depths: Sequence[int]
    seeds: Sequence[int]
    epochs: int
    batch_size: int | None
    optimizer: str
    lr: float | None
    norm: str | None
    init: str | None
    precision: str


# Each setting: its type, and that of its elements if it is a list.
_KINDS: dict[str, tuple[str, type, type | None]] = {
    "data": ("a string", str, None),
    "image_size": ("a whole number", int, None),
    "per_class": ("a whole number", int, None),
    "augment": ("true or false", bool, None),
    "families": ("a list of strings", list, str),
    "models": ("a list of strings", list, str),
    "depths": ("a list of whole numbers", list, int),
    "seeds": ("a list of whole numbers", list, int),
    "epochs": ("a whole number", int, None),
    "batch_size": ("a whole number", int, None),
    "optimizer": ("a string", str, None),
    "lr": ("a number", float, None),
    "norm": ("a string", str, None),
    "init": ("a string", str, None),
    "precision": ("a string", str, None),
}


def read_specs(path: str | Path) -> list[Settings]:
    """Reads the settings of a sweep.

    Args:
        path: A TOML file with any of the keys of `Settings`, or the results of a sweep, which hold one spec for each
            different command that wrote them. A relative path of data or a module is relative to the working folder.

    Returns:
        The settings that are stated; of a TOML file, one.

    Raises:
        ArgumentError: The file cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
        StoreError: The results are damaged, or are of a version that stored no spec.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sweep.toml"
        >>> _ = path.write_text('depths = [8, 14]  # shallow')
        >>> read_specs(path)
        [{'depths': [8, 14]}]
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"spec: {path} cannot be read: {error.strerror}") from error
    if not content.startswith(_SQLITE):
        return [_parse(str(path), content)]
    with open_run(path) as run:
        texts = run.specs()
    if not texts:
        raise StoreError(f"{path}: has no spec; it was written by an older version of gradprobe")
    return [_parse(str(path), text.encode()) for text in texts]


def replaced(settings: Settings, given: Settings) -> Settings:
    """Replaces settings by those given; another optimizer without a learning rate does not keep the old one's.

    Example:
        >>> replaced({"optimizer": "sgd", "lr": 0.1, "epochs": 2}, {"optimizer": "adamw"})
        {'optimizer': 'adamw', 'epochs': 2}
        >>> replaced({"optimizer": "sgd", "lr": 0.1}, {"optimizer": "SGD(nesterov=True)"})
        {'optimizer': 'SGD(nesterov=True)', 'lr': 0.1}
    """
    merged: Settings = {**settings, **given}
    old, new = (one.get("optimizer", "sgd").partition("(")[0].strip().lower() for one in (settings, merged))
    if old != new and "lr" not in given:
        merged.pop("lr", None)
    return merged


def to_toml(settings: Mapping[str, object]) -> str:
    """Writes settings as TOML; those that are None or empty are left out.

    Example:
        >>> print(to_toml({"data": "digits", "depths": (8, 14), "lr": 1e-3, "norm": None}))
        data = "digits"
        depths = [8, 14]
        lr = 0.001
    """
    stated = {name: value for name, value in settings.items() if value is not None and value != ()}
    return "\n".join(f"{name} = {_toml_value(value)}" for name, value in stated.items())


def _toml_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's strings, numbers and booleans are TOML's, but for one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse(place: str, content: bytes) -> Settings:
    if sys.version_info < (3, 11):
        raise ArgumentError(f"spec: a spec file needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    import tomllib

    try:
        values = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"spec: {place} is no TOML file: {error}") from error
    for name, value in values.items():
        if name not in _KINDS:
            raise not_among(f"spec: {place}", name, _KINDS, "keys among")
        needed, kind, element = _KINDS[name]
        elements = value if element is not None and isinstance(value, list) else []
        if not _is(value, kind) or not all(_is(one, element or object) for one in elements):
            raise ArgumentError(f"spec: {place}: needed {needed} for {name}, got {value!r}")
    return cast(Settings, values)


def _is(value: Any, kind: type) -> bool:
    """Returns whether a value has a type; True is no number, and a whole number will do for a number."""
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)
