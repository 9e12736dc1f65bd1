"""load_config(schema, argv): dataclass defaults <- YAML file <- `key=value` arguments.

Every command of the project reads its options here, so that a misspelt key, a wrong type, an
illegal value or a missing required value is refused at once, by name, in one way everywhere.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what is legal."""


def load_config(schema: type[Schema], argv: list[str] | None = None) -> Schema:
    """Returns an instance of the dataclass `schema`, checked and complete.

    argv: `config=path.yaml` (optional) and `section.key=value` overrides; None reads sys.argv.
    `--help` prints every key with its type, default and meaning, and exits.
    Raises ConfigError (unknown key, wrong type, illegal value, missing required key or file).
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(describe(schema), flush=True)
        raise SystemExit(0)
    words = [word for word in argv if "=" not in word]
    if words:
        raise ConfigError(f"cannot read {words[0]!r}: arguments are key=value; --help lists them")
    path, overrides = None, []
    for word in argv:
        if word.startswith("config="):
            path = Path(word.removeprefix("config="))
        else:
            overrides.append(word)
    layers = [OmegaConf.structured(schema)]
    if path is not None:
        layers.append(_read_yaml(path))
    layers.append(_read_words(overrides))
    for layer in layers[1:]:
        given = OmegaConf.to_container(layer)
        _refuse_unknown(schema, given)
        for key in _unquoted_no(schema, given):
            OmegaConf.update(layer, key, "no")
    return _build(layers, path)


def load_command_config(schema: type[Schema], argv: list[str] | None, usage: str) -> Schema:
    """load_config for a command line: a ConfigError ends it with one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print(textwrap.dedent(usage).strip() + "\n")
        return load_config(schema, argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `--help | head` has seen enough; at exit, too, nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def open_section(schema: type) -> Any:
    """A dict field that holds some of `schema`'s keys: checked like a section, completed later.

    For sections whose other values follow from data (the transformer's from the store).
    """
    return dataclasses.field(default_factory=dict, metadata={"schema": schema})


def build_section(schema: type[Schema], given: dict[str, Any], prefix: str) -> Schema:
    """An open section's keys as an instance of its schema. Raises ConfigError."""
    _refuse_unknown(schema, given, f"{prefix}.")
    try:
        return typing.cast(Any, OmegaConf.to_object(_merge_section(schema, given, prefix)))
    except (TypeError, ValueError) as error:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"{prefix}: {error}")
        ) from None


def dump_config(config: Any) -> str:
    """The resolved configuration as YAML text (what a run directory keeps)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(full key, old, new) of every value that differs between two resolved configurations."""
    for key in sorted({*before, *after}, key=str):
        old, new = before.get(key), after.get(key)
        if OmegaConf.is_dict(old) and OmegaConf.is_dict(new):
            yield from changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def describe(schema: type) -> str:
    """All keys of a schema, one a line with type and default, and the sentence under each."""
    lines = ["Options: config=FILE.yaml, then key=value. ??? marks a required one.", ""]
    for key, kind, default, words in _walk(schema):
        lines.append(f"  {key}={default}  ({kind})")
        lines += textwrap.wrap(words, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        ours = Path(__file__).parent
        near = sorted(path.parent.glob("*.yaml")) if path.parent != Path(".") else []
        near = near or sorted(ours.glob(f"{path.parent.name or '*'}/*.yaml"))
        found = ", ".join(map(str, near or sorted(ours.rglob("*.yaml"))))
        raise ConfigError(f"config={path} does not exist; there are: {found}")
    return OmegaConf.load(path)


def _read_words(words: list[str]) -> Any:
    """`key=value` arguments. Raises ConfigError, naming the word, for a value that is no YAML."""
    for word in words:
        try:
            OmegaConf.from_dotlist([word])
        except (YAMLError, OmegaConfBaseException) as error:
            problem = str(error).splitlines()[0]
            raise ConfigError(f"cannot read {word!r}: {problem}; lists are [a,b]") from None
    return OmegaConf.from_dotlist(words)


def _build(layers: list[Any], path: Path | None) -> Any:
    try:
        merged = OmegaConf.merge(*layers)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            where = f"in {path} or " if path else ""
            raise ConfigError(f"{', '.join(missing)} must be given: set {where}as {missing[0]}=…")
        config = OmegaConf.to_object(merged)
        for prefix, section, given in _open_sections(config):
            _merge_section(section, given, prefix)
        return config
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {str(error.msg or error).splitlines()[0]}") from None
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None


def _merge_section(schema: type, given: dict[str, Any], prefix: str) -> Any:
    """Some keys of a schema laid over its defaults, types checked."""
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        key = f"{prefix}.{getattr(error, 'full_key', '')}"
        raise ConfigError(f"{key}: {str(error.msg or error).splitlines()[0]}") from None


def _open_sections(config: Any, prefix: str = "") -> Iterator[tuple[str, type, dict]]:
    """(full key, schema, value) of every open section of a config object."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "schema" in field.metadata:
            yield f"{prefix}{field.name}", field.metadata["schema"], value
        elif dataclasses.is_dataclass(value):
            yield from _open_sections(value, f"{prefix}{field.name}.")


def _refuse_unknown(schema: type, given: Any, prefix: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    for key, value in (given or {}).items():
        if key not in fields:
            legal = [f"{prefix}{name}" for name in fields] + [k for k, *_ in _walk(schema, prefix)]
            close = difflib.get_close_matches(f"{prefix}{key}", legal, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"legal: {', '.join(fields)}"
            raise ConfigError(f"unknown key {prefix}{key}; {hint}")
        section = fields[key].metadata.get("schema", hints[key])
        if dataclasses.is_dataclass(section) and isinstance(value, dict):
            _refuse_unknown(typing.cast(type, section), value, f"{prefix}{key}.")


def _unquoted_no(schema: type, given: Any, prefix: str = "") -> Iterator[str]:
    """Full keys of `no`, which YAML takes for False, where "no" is a legal word."""
    hints = typing.get_type_hints(schema)
    for key, value in (given or {}).items():
        if value is False and "no" in typing.get_args(hints[key]):
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            yield from _unquoted_no(typing.cast(type, hints[key]), value, f"{prefix}{key}.")


def _walk(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (full key, type, default, meaning) for every leaf of a dataclass tree."""
    hints, words = typing.get_type_hints(schema), _field_docs(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        hint = field.metadata.get("schema", hints[field.name])
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default: Any = field.default
        if default is dataclasses.MISSING:
            factory: Any = field.default_factory
            default = "???" if factory is dataclasses.MISSING else factory()
        kind = str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__
        yield f"{prefix}{field.name}", kind, str(default), words.get(field.name, "")


def _field_docs(schema: type) -> dict[str, str]:
    """The string literal after each field in the class body, parents' too, as one line."""
    parents = [_field_docs(base) for base in schema.__bases__ if dataclasses.is_dataclass(base)]
    docs = {name: words for parent in parents for name, words in parent.items()}
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    for field, after in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def check_range(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Raises ValueError, naming the key, for a value outside [low, high]; none is in any."""
    if value is None or value == MISSING:
        return
    if not low <= value <= high:
        legal = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
        raise ValueError(f"{name}={value}: legal are {legal}")
