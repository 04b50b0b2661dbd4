"""Reading RL Zoo style YAML without running what it says.

RL Zoo loads saved configurations by ``yaml.UnsafeLoader``, evaluates some of their strings as Python and imports whatever they
name. Here a file is data: YAML's own types and the two tags that RL Zoo writes; strings such as ``dict(net_arch=[64, 64])`` are
parsed, never evaluated; and names are those of wrappers, callbacks and policies of well-known packages, which are told no file to
write, unless the caller trusts the file.
"""

import ast
import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

#: Packages that a configuration may name classes of.
KNOWN_PACKAGES = (
    "gymnasium",
    "gymnasium_robotics",
    "minigrid",
    "rl_zoo3",
    "sb3_contrib",
    "sb3_diffrl",
    "stable_baselines3",
)
#: Keys whose strings RL Zoo evaluates as Python.
EVALUATED = ("monitor_kwargs", "normalize", "policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")
#: Keys whose strings name something to import, and the class that it has to be a subclass of.
IMPORTED = {
    "env_wrapper": "gymnasium.Wrapper",
    "vec_env_wrapper": "stable_baselines3.common.vec_env.VecEnvWrapper",
    "callback": "stable_baselines3.common.callbacks.BaseCallback",
    "policy": "stable_baselines3.common.policies.BasePolicy",
}
#: Bytes of a file, and of what it would be with its aliases written out; and how deep it may be nested. RL Zoo's have 20,000 and 5.
MAX_SIZE, MAX_DEPTH = 2**20, 50
# Characters of a string that is parsed as Python.
_MAX_EXPRESSION = 10_000
# Words in the name of an argument that says which file to write.
_PATH = re.compile(r"(^|_)(path|file|filename|folder|dir|directory)s?($|_)")
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
    """YAML's own types, and the tags that RL Zoo writes when it saves a run; no more than can be written out."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _written_out(node, {})
        return super().construct_document(node)


def _written_out(node: yaml.Node, seen: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Size and depth of a node with its aliases written out. A few lines of aliases of aliases are more than any memory holds."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value), 1
    if id(node) not in seen:
        seen[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        parts = [_written_out(child, seen) for child in children]
        seen[id(node)] = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    found = seen[id(node)]
    if found is None:
        raise ValueError("it holds an alias of what the alias is in")
    if found[0] > MAX_SIZE or found[1] > MAX_DEPTH:
        raise ValueError(
            f"with its aliases written out, it has more than {MAX_SIZE} bytes, or is nested more than {MAX_DEPTH} deep"
        )
    return found


def _integer(loader: _Loader, node: yaml.Node) -> int:
    number = int(loader.construct_yaml_int(node))
    if abs(number) >= 2**63:
        raise ValueError("it holds an integer of more than 64 bits")
    return number


def _ordered_dict(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    # !!python/object/apply:collections.OrderedDict [[[key, value], ...]]
    pairs = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None
    if pairs is None or len(pairs) != 1 or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs[0]):
        raise UnsafeConfigError("An OrderedDict that is not a list of pairs: RL Zoo does not write such a file.")
    return dict(pairs[0])


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(node, deep=True)),
)


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    :raises FileNotFoundError: if there is none
    :raises UnsafeConfigError: if it holds Python objects, which are code in disguise
    :raises ValueError: if it is not YAML, or more than ``MAX_SIZE`` or ``MAX_DEPTH``
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size > MAX_SIZE:
        raise ValueError(f"{path} has more than {MAX_SIZE} bytes, which no configuration has.")
    content = path.read_bytes()
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader=_Loader)
    except UnsafeConfigError:
        raise
    except yaml.constructor.ConstructorError as error:
        raise UnsafeConfigError(f"{path} holds {error.problem}: only plain data are read from a configuration.") from error
    except Exception as error:
        # PyYAML's constructors let through whatever their conversions raise, from KeyError to AttributeError.
        kind = "" if isinstance(error, (yaml.YAMLError, ValueError)) else f"{type(error).__name__}, "
        raise ValueError(f"{path} is not YAML that is read: {kind}{str(error)[:500]}.") from error


def load_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of names and their values, see ``load_yaml()``.

    :raises ValueError: if it holds anything else
    """
    return settings(load_yaml(path), str(path))


def settings(value: Any, what: str) -> dict[str, Any]:
    """Check that a value is a dict whose keys are strings.

    :param what: the value's name in the message
    :return: a copy
    :raises ValueError: if it is anything else
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} holds no settings, lines such as `name: value`.")
    return dict(value)


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
    shown = repr(text if len(text) < 200 else text[:200] + "...")
    if len(text) > _MAX_EXPRESSION:
        raise UnsafeConfigError(f"{shown} has more than {_MAX_EXPRESSION} characters")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except UnsafeConfigError as error:
        raise UnsafeConfigError(f"{shown} is not read: {error}") from None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        # Besides syntax: zero bytes, keys that are lists, numbers without end, thousands of brackets.
        raise UnsafeConfigError(f"{shown} is not a Python expression that is read ({type(error).__name__})") from error


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
                parsed = parse_python(resolved[key])
                if isinstance(parsed, str):
                    # RL Zoo would evaluate that in turn.
                    raise UnsafeConfigError("it is a string within a string")
                resolved[key] = parsed
            except UnsafeConfigError as error:
                if not trust:
                    raise UnsafeConfigError(f"`{key}`: {error}. {_TRUST}") from None
    if not trust:
        for key, kind in IMPORTED.items():
            for name, arguments in named(resolved.get(key), key):
                if key != "policy" or "." in name:
                    _check_name(key, name, arguments, kind)
    return resolved


def _check_name(key: str, name: str, arguments: Mapping[str, Any], kind: str) -> None:
    """RL Zoo calls what is under a name: it has to be a class of its kind, of a known package, that is told no file to write."""
    if "." not in name:
        raise ValueError(f"`{key}` names {name!r}, which is not of the form package.module.Class.")
    if name.split(".")[0] not in KNOWN_PACKAGES:
        raise UnsafeConfigError(f"`{key}` names {name}, which is not of {', '.join(KNOWN_PACKAGES)}. {_TRUST}")
    try:
        base, found = _found(kind), _found(name)
    except Exception as error:
        # What a module raises when it is imported is its own affair.
        raise ValueError(f"`{key}` names {name}, which cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, base) and found.__module__.split(".")[0] in KNOWN_PACKAGES):
        raise UnsafeConfigError(f"`{key}` names {name}, which is not a subclass of {kind} in {', '.join(KNOWN_PACKAGES)}. {_TRUST}")
    told = [argument for argument in arguments if _PATH.search(argument)]
    if told:
        raise UnsafeConfigError(f"`{key}` tells {name} which file to write: {', '.join(told)}. {_TRUST}")


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def named(entry: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and their arguments in an ``env_wrapper``, ``callback`` or ``policy`` entry.

    :param entry: a name, ``{name: arguments}``, or a list of these
    :param key: of the entry, for the message
    :raises ValueError: if it is anything else
    """
    if entry is None:
        return []
    if isinstance(entry, list):
        return [pair for part in entry for pair in named(part, key)]
    if isinstance(entry, str):
        return [(entry, {})]
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, arguments),) = entry.items()
        if isinstance(name, str) and isinstance(arguments, dict) and all(isinstance(argument, str) for argument in arguments):
            return [(name, arguments)]
    raise ValueError(f"`{key}` is not a name, {{name: {{argument: value}}}}, or a list of these. Check the indentation.")


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Nearest: a, b."`` for a message about an unknown name, or nothing if none is like it."""
    found = difflib.get_close_matches(name, set(known), n=3, cutoff=0.4)
    return f" Nearest: {', '.join(found)}." if found else ""


def packaged_hyperparams(algo: str) -> Path:
    """The YAML file that the package ships for an algorithm."""
    return Path(str(files("sb3_diffrl").joinpath("zoo", "hyperparams", f"{algo}.yml")))
