"""Recipes: how to build an object, as plain data that is safe to read from a file.

A recipe is a mapping with ``class_path`` and ``init_args``, as in a configuration; arguments may be recipes again.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def build_module(recipe: Mapping[str, Any], allow: Sequence[str] = ()) -> nn.Module:
    """Build the module a recipe describes, from trusted packages alone.

    Args:
        recipe: Mapping with ``class_path`` and ``init_args``.
        allow: Packages besides lit_adv whose classes the recipe may name.

    Raises:
        ValueError: If the recipe names anything else, or does not fit the class it names.
    """
    _check(recipe, allow)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "module")
    try:
        config = parser.parse_object({"module": dict(recipe)})
    except Exception as error:
        raise ValueError(f"the recipe of {recipe['class_path']} does not fit its class: {error}") from None
    module: nn.Module = parser.instantiate(config).module
    return module


def is_recipe(value: Any) -> bool:
    """Whether a value is a mapping that names a class by its path."""
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _check(recipe: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Refuse a recipe that names classes or functions outside the trusted packages."""
    packages = ("lit_adv", *allow)
    for path in _class_paths(recipe):
        if not _within(path, packages) or not isinstance(_resolve(path, packages), type):
            raise ValueError(
                f"class_path {path!r} is not a class of {' or '.join(packages)}, and nothing else is run from a "
                f"file; if you trust it, allow its package"
            )
    for text in filter(_DOTTED.fullmatch, _strings(recipe)):
        # A function may be named by its path too; a string that could import some other package is refused.
        inside = _within(text, packages)
        if (inside and _resolve(text, packages) is None) or (not inside and _importable(text.split(".")[0])):
            raise ValueError(f"{text!r} names something outside {' or '.join(packages)}; if you trust it, allow it")


def _within(path: str, packages: Sequence[str]) -> bool:
    return any(path.startswith(f"{package}.") for package in packages)


def _importable(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _resolve(path: str, packages: Sequence[str]) -> Any:
    """The object at a path, None where it is missing or was only imported there from another package."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if _within(f"{getattr(found, '__module__', '')}.", packages) else None


def _class_paths(value: Any) -> Iterator[str]:
    if is_recipe(value):
        yield value["class_path"]
    for child in _children(value):
        yield from _class_paths(child)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for child in _children(value):
        yield from _strings(child)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (child for key, child in value.items() if key != "class_path")
    elif isinstance(value, (list, tuple)):
        yield from value
