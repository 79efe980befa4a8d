"""One clear line about a faulty configuration, with the nearest valid name, out of jsonargparse's account of it."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from lit_adv.threat import ThreatModel

COLLECTIONS = ("attacks", "callbacks", "datamodules", "defenses", "estimators", "models", "objectives", "tasks")
FURTHER = ("pytorch_lightning.callbacks", "torch.optim", "torch.optim.lr_scheduler", "torch.nn")

_EXPECTED = re.compile(r"^Expected a <class '([\w.]+)'>$")
# What jsonargparse says besides the reason.
_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Parser key|Problem with given class_path"
    r"|Expected a <class 'NoneType'>|Expected a path but|Not a valid subclass of|Subclass types expect one of"
    r"|a class path \(str\)|a dict with class_path|an instance of)"
)


def explain(message: str, known: Iterable[str] = ()) -> str:
    """The reason why a configuration was refused, in one line.

    Args:
        message: jsonargparse's error, often of many lines.
        known: Keys that the command line knows, in dot notation.
    """
    for rule in (_unknown_option, _unknown_class, _missing_file):
        if told := rule(message):
            return told
    return _unknown_key(message, known) or _reason(message)


def class_paths(packages: Iterable[str] | None = None) -> list[str]:
    """Paths of all classes that a configuration usually names.

    Args:
        packages: Where to look; ``None``: the collections of lit_adv and what they build on.
    """
    found = []
    for package in packages if packages is not None else [f"lit_adv.{name}" for name in COLLECTIONS] + [*FURTHER]:
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        found += [f"{package}.{name}" for name in names if callable(getattr(module, name, None))]
    return found


def _unknown_class(message: str) -> str | None:
    patterns = (
        r"given class_path '([^']+)':\s+(?:module '[^']+' has no attribute|No module named)",
        r"(?:Unexpected import path format|Expected a dot import path string): ([\w.]+)\s*$",
        r"Import path ([\w.]+) ",
    )
    for pattern in patterns:
        if found := re.search(pattern, message, flags=re.MULTILINE):
            path = found.group(1)
            if path.endswith((".yaml", ".yml", ".json")):
                return None
            told = _broken_import(path) or f"there is no class {path}{_nearest_class(path)}"
            return f"{_key(message[: found.start()])}{told}"
    return None


def _broken_import(path: str) -> str | None:
    """What is wrong with a module that is there but cannot be imported, or whose package is not on the path."""
    module = path.rpartition(".")[0]
    if not module or module.split(".")[0] in ("lit_adv", "torch", "pytorch_lightning", "torchvision"):
        return None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"there is no module {error.name}{_nearest_class(path) or '; is its folder on PYTHONPATH?'}"
        return f"{module} cannot be imported: {error}"
    except Exception as error:  # whatever the user's module raises is the reason
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


def _nearest_class(path: str) -> str:
    paths = class_paths()
    name = path.rpartition(".")[2].lower()
    names = {full.rpartition(".")[2].lower(): full for full in reversed(paths)}  # the collections win
    if close := difflib.get_close_matches(path, [p for p in paths if p.startswith("lit_adv.")], n=1, cutoff=0.85):
        return f"; did you mean {close[0]}?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
        return f"; did you mean {names[near[0]]}?"
    return ""


def _unknown_option(message: str) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", message)
    owners = re.findall(r"given class_path '([^']+)'", message[: found.start()]) if found else []
    if not found or not owners:
        return None
    option, owner = found.group(1), owners[-1]
    return f"{_key(message[: found.start()])}{owner} has no argument {option}{_nearest(option, _arguments(owner))}"


def _arguments(path: str) -> list[str]:
    """The arguments of a class, those that its constructor passes on to its parents among them."""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    owners = kind.__mro__ if isinstance(kind, type) else (kind,)
    names = [p.name for owner in owners for p in inspect.signature(owner).parameters.values() if p.kind in (1, 3)]
    return list(dict.fromkeys(names))


def _unknown_key(message: str, known: Iterable[str]) -> str | None:
    known = sorted(set(known))
    if found := re.search(r"(?:does not accept option|unrecognized arguments:) '?(?:--)?([\w.+]+)", message):
        owner = re.search(r"Group '([^']+)'", message)
        key = f"{owner.group(1)}.{found.group(1)}" if owner else found.group(1)
        heads = {name.split(".")[0] for name in known}
        if (
            owner and owner.group(1).split(".")[0] not in heads
        ):  # an argument that is itself a group, as the threat model
            near = _nearest(found.group(1), [field.name for field in fields(ThreatModel)])
            return f"{_key(message[: found.start()])}{owner.group(1)} has no argument {found.group(1)}{near}"
        if key.split(".")[0] not in heads and f"--{key}" not in message:  # a file names the whole, down to its leaves
            key = key.split(".")[0]
            return f"there is no key {key}{_nearest(key, sorted(heads))}"
        inside = [name for name in known if name.startswith(f"{key.split('.')[0]}.")]
        return f"there is no key {key}{_nearest(key, known) or _nearest(key, inside)}"
    return None


def _missing_file(message: str) -> str | None:
    found = re.search(
        r"Expected a path but (\S+) either not|File does not exist: '?([^'\n]+?)'?$", message, re.MULTILINE
    )
    path = Path((found.group(1) or found.group(2)) if found else "")
    if not found or not (path.suffix or "/" in str(path)):
        return None
    key = _key(message[: found.start()])
    beside = [str(path.parent / other.name) for other in path.parent.glob(f"*{path.suffix}")]
    return f"{key}there is no file {path}{_nearest(str(path), beside, cutoff=0.8)}"


def _reason(message: str) -> str:
    """What is left of the message when the account of what was tried is taken out."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = [re.sub(r"Expected a <class '([\w.]+)'>\. Got value:", r"expected \1, got", line) for line in lines]
    reasons = [line for line in lines if line and not _NOISE.match(line)]
    expected = [kind for line in reasons for kind in _EXPECTED.findall(line)]
    told = list(dict.fromkeys(line for line in reasons if not _EXPECTED.match(line)))
    if expected:
        given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value:")), "")
        told.append(f"expected {' or '.join(dict.fromkeys(expected))}, got {given}")
    return f"{_key(message)}{'; '.join(told) or message}"


def _key(message: str) -> str:
    """The place in the configuration, as a prefix."""
    keys = re.findall(r"Parser key \"([^\"]+)\"", message)
    return f"{'.'.join(keys)}: " if keys else ""


def _nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    valid = list(valid)
    if close := difflib.get_close_matches(name, valid, n=1, cutoff=cutoff):
        return f"; did you mean {close[0]}?"
    return f"; valid are {', '.join(valid)}" if 0 < len(valid) <= 12 else ""
