"""Read the YAML of job files to plain values, with the environment filled in; write it back."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

Loc = tuple[str | int, ...]
"""A place in a document: keys, and positions in a list."""

# Scalars of YAML 1.2. PyYAML's own follow YAML 1.1, where 5e-5 is text, `no` is false and 1:30 is 90.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:null|Null|NULL|~|)$"), lambda text: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), lambda text: text.lower() == "true"),
    "int": (re.compile(rf"[-+]?(?:0|(?!0){_DIGITS})$"), int),
    "float": (
        re.compile(rf"[-+]?(?:{_DIGITS}\.[0-9]*|\.[0-9]+|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
        float,
    ),
    "str": (re.compile(r"(?s:.*)$"), str),
}
_TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """Loader that tells scalars apart by `_SCALARS`."""


class Dumper(yaml.SafeDumper):
    """Dumper that quotes text which `Loader` would not read as text, and writes tuples as lists in one line."""


for _yaml in (Loader, Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _name, (_pattern, _) in _SCALARS.items():
        _yaml.add_implicit_resolver(_TAG + _name, _pattern, None)
Dumper.add_representer(tuple, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True))

_INTERPOLATION = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
# While YAML is parsed, a number between two private-use characters stands for an interpolation. So its braces mean
# nothing to YAML, and the environment's text cannot add structure.
_HIDDEN = re.compile("\ue000([0-9]+)\ue001")


class Reader:
    """Reads the YAML of one text to plain values: mappings, tuples and scalars, with the environment filled in."""

    def __init__(self, text: str, env: Mapping[str, str]) -> None:
        self.env = env

        # Interpolations in the order of the text, and mistakes by place.
        self.interpolations: list[str] = []
        self.mistakes: dict[Loc, str] = {}
        self.text = re.sub(r"\$\{[^}\n]*\}", self._hide, text)

    def _hide(self, match: re.Match[str]) -> str:
        self.interpolations.append(match[0])
        return f"\ue000{len(self.interpolations) - 1}\ue001"

    def read(self, node: yaml.Node, loc: Loc = ()) -> Any:
        """Return the plain value of a node.

        Raises `YAMLError` for YAML that no job file has: tags of its own, keys that are no words.
        """
        tag = node.tag.removeprefix(_TAG)
        if tag not in (*_SCALARS, "map", "seq"):
            raise _make_error(node, f"unknown tag {node.tag}")
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.read(item, (*loc, i)) for i, item in enumerate(node.value))

        # A scalar that is an interpolation and nothing else takes the type of the filled-in text.
        text = _HIDDEN.sub(lambda match: self._fill(self.interpolations[int(match[1])], loc), node.value)
        if text and _HIDDEN.fullmatch(node.value):
            tag = next(name for name, (pattern, _) in _SCALARS.items() if pattern.fullmatch(text))

        try:
            return _SCALARS[tag][1](text)
        except (KeyError, ValueError) as error:
            raise _make_error(node, f"not a valid {tag}") from error

    def _read_mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _make_error(key_node, "a key must be a word")

            # An interpolation in a key stays as it is written.
            key = _HIDDEN.sub(lambda match: self.interpolations[int(match[1])], key_node.value)
            is_repeated = key in found
            found[key] = self.read(value_node, (*loc, key))

            # A repeated key is a mistake.
            if is_repeated:
                line = key_node.start_mark.line + 1
                self.mistakes[*loc, key] = f"given twice (again in line {line})"
        return found

    def _fill(self, written: str, loc: Loc) -> str:
        """Return the text that an interpolation stands for.

        Without a text, note a mistake.
        """
        match = _INTERPOLATION.fullmatch(written)
        if not match:
            self.mistakes[loc] = f"{written} is neither ${{VAR}} nor ${{VAR:-default}}"
            return written

        # As in a shell, the default stands in for an empty variable too.
        value = self.env.get(match[1])
        if match[2] is not None:
            return value or match[2]
        if value is None:
            self.mistakes[loc] = f"environment variable {match[1]} is not set"
            return written
        return value


def _make_error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def locate_syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Return the line and the reason of a syntax error.

    Lines count from 1.
    """
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return error.problem_mark.line + 1, str(error.problem)

    # A character that YAML does not allow: only its position is known.
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position) + 1, getattr(error, "reason", str(error))
