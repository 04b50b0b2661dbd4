"""Reading RL Zoo style YAML without running what it says.

RL Zoo loads saved configurations by ``yaml.UnsafeLoader``, evaluates some of their strings as Python and imports whatever they
name. Here a file is data: YAML's own types and the two tags that RL Zoo writes; strings such as ``dict(net_arch=[64, 64])`` are
parsed, never evaluated; and classes are imported from well-known packages only, unless the caller trusts the file.
"""

import ast
import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

#: Packages that a configuration may name classes of.
KNOWN_PACKAGES = (
    "gymnasium",
    "gymnasium_robotics",
    "minari",
    "minigrid",
    "rl_zoo3",
    "sb3_contrib",
    "sb3_diffrl",
    "stable_baselines3",
)
#: Keys whose strings RL Zoo evaluates as Python.
EVALUATED = ("monitor_kwargs", "normalize", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")
#: Keys whose strings name something to import, in the order in which they are used.
IMPORTED = ("env_wrapper", "vec_env_wrapper", "callback", "policy")
# Names that strings of configurations may use besides literals, and where they come from.
_NAMESPACES = {
    "nn": "torch.nn",
    "th.nn": "torch.nn",
    "torch.nn": "torch.nn",
    "th.optim": "torch.optim",
    "torch.optim": "torch.optim",
}
_CLASSES = {
    "HerReplayBuffer": ("stable_baselines3", "HerReplayBuffer"),
    "RMSpropTFLike": ("stable_baselines3.common.sb2_compat.rmsprop_tf_like", "RMSpropTFLike"),
}
_TRUST = "If you trust the file, say so: --trust."


class UnsafeConfigError(ValueError):
    """A configuration would run code that nobody vouched for."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's own types, and the tags that RL Zoo writes when it saves a run."""


def _ordered_dict(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    # !!python/object/apply:collections.OrderedDict [[[key, value], ...]]
    pairs = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None
    if pairs is None or len(pairs) != 1 or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs[0]):
        raise UnsafeConfigError("An OrderedDict that is not a list of pairs: RL Zoo does not write such a file.")
    return dict(pairs[0])


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    :raises FileNotFoundError: if there is none
    :raises UnsafeConfigError: if it holds Python objects, which are code in disguise
    :raises ValueError: if it is not YAML
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        raise UnsafeConfigError(f"{path} holds {error.problem}: only plain data are read from a configuration.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def dump_yaml(data: Any, path: Path) -> None:
    """Write plain data as YAML that every safe loader reads; tuples become lists, what is not plain its ``str``."""
    path.write_text(yaml.safe_dump(_plain(data), sort_keys=True, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, range)):
        return [_plain(entry) for entry in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def is_plain(value: Any) -> bool:
    """Whether a value is made of dicts, lists, tuples, numbers, strings, booleans and None alone."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(entry) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def parse_python(text: str) -> Any:
    """The value of the small part of Python that configurations use: literals, ``dict(...)``, ``nn.ReLU``, ``HerReplayBuffer``.

    :raises UnsafeConfigError: if there is anything else in it
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise UnsafeConfigError(f"{text!r} is not a Python expression.") from error
    except UnsafeConfigError as error:
        raise UnsafeConfigError(f"{text!r} is not read: {error}") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        if (
            not (isinstance(node.func, ast.Name) and node.func.id == "dict")
            or node.args
            or any(k.arg is None for k in node.keywords)
        ):
            raise UnsafeConfigError(f"it calls {ast.unparse(node.func)}, and only dict(name=value, ...) is read")
        return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        entries = [_value(entry) for entry in node.elts]
        return entries if isinstance(node, ast.List) else tuple(entries)
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _named(ast.unparse(node))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UnsafeConfigError(f"{ast.unparse(node)} is not a literal") from None


def _named(name: str) -> Any:
    if name in _CLASSES:
        module, attribute = _CLASSES[name]
        return getattr(importlib.import_module(module), attribute)
    namespace, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(_NAMESPACES[namespace]), attribute, None) if namespace in _NAMESPACES else None
    if not isinstance(found, type):
        raise UnsafeConfigError(f"{name} is not a class of torch.nn or torch.optim, nor {' or '.join(_CLASSES)}")
    return found


def parse_entry(text: str) -> tuple[str, Any]:
    """One ``key:value`` (or ``key=value``) of a command line; what is not plain Python stays a string.

    >>> parse_entry("learning_rate:3e-4"), parse_entry("learning_rate:lin_3e-4"), parse_entry("train_freq:[1,'episode']")
    (('learning_rate', 0.0003), ('learning_rate', 'lin_3e-4'), ('train_freq', [1, 'episode']))

    :raises ValueError: if there is no key
    """
    at = min((i for i in (text.find(":"), text.find("=")) if i > 0), default=-1)
    if at < 0 or not text[:at].isidentifier():
        raise ValueError(f"{text!r} is not of the form name:value.")
    key, value = text[:at], text[at + 1 :]
    try:
        parsed = parse_python(value)
    except UnsafeConfigError:
        parsed = {"true": True, "false": False, "null": None}.get(value, value)
    # A class, say in policy_kwargs: kept as text, so that the run's configuration can be saved and read again.
    return key, parsed if is_plain(parsed) else value


def resolve(hyperparams: Mapping[str, Any], trust: bool = False) -> dict[str, Any]:
    """Parse the strings that RL Zoo would evaluate, and refuse to import what is not of a known package.

    :param hyperparams: as a file has them
    :param trust: the user vouches for what the file names
    :return: the same with values in place of such strings
    :raises UnsafeConfigError: naming what was refused, and what to do
    """
    resolved = dict(hyperparams)
    for key in EVALUATED:
        if isinstance(resolved.get(key), str):
            try:
                resolved[key] = parse_python(resolved[key])
            except UnsafeConfigError as error:
                if not trust:
                    raise UnsafeConfigError(f"`{key}`: {error}. {_TRUST}") from None
    for key in IMPORTED:
        for name in imported_names(resolved.get(key)):
            if not trust and "." in name and name.split(".")[0] not in KNOWN_PACKAGES:
                raise UnsafeConfigError(f"`{key}` names {name}, which is not of {', '.join(KNOWN_PACKAGES)}. {_TRUST}")
    return resolved


def imported_names(entry: Any) -> list[str]:
    """Names in an ``env_wrapper``, ``callback`` or ``policy`` entry: a string, ``{name: arguments}``, or a list of these."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, dict):
        return [str(name) for name in entry]
    return [name for part in entry for name in imported_names(part)] if isinstance(entry, list) else []


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Nearest: a, b."`` for a message about an unknown name, or nothing if none is like it."""
    found = difflib.get_close_matches(name, set(known), n=3, cutoff=0.4)
    return f" Nearest: {', '.join(found)}." if found else ""


def packaged_hyperparams(algo: str) -> Path:
    """The YAML file that the package ships for an algorithm."""
    return Path(str(files("sb3_diffrl").joinpath("zoo", "hyperparams", f"{algo}.yml")))
