"""Describe job files by a JSON schema, of draft 7, which editors' YAML servers know best."""

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from corun_ray.config.jobs import KINDS, ColabatorJob
from corun_ray.config.reference import find_section, list_keys

DRAFT = "http://json-schema.org/draft-07/schema#"
_VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^{}]*)?\}"}
_REF = "#/definitions/{model}"
_LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}


def format_schema() -> str:
    """Return the schema as `corun-ray schema` prints it."""
    return json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"


def build_schema() -> dict[str, Any]:
    """Build the schema of one document of a job file.

    Any value may be `${VAR}`. Only `corun-ray check` finds keys that do not go together.
    """
    # pydantic's own schema of all kinds, converted model by model.
    references, tree = models_json_schema([(job, "validation") for job in KINDS.values()], ref_template=_REF)
    definitions: dict[str, Any] = {}
    for name, schema in tree["$defs"].items():
        definitions[name] = _convert_model(schema, tree["$defs"], is_job="kind" in schema["properties"])
    _add_searchable_keys(definitions["TuneSection"])

    # A document of a kind follows the definition of that kind.
    rules = []
    for kind, job in KINDS.items():
        is_kind = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        rules.append({"if": is_kind, "then": references[job, "validation"]})

    return {
        "$schema": DRAFT,
        "title": "A job of corun_ray",
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": [*KINDS], "description": "kind of job"}},
        "allOf": rules,
        "definitions": {"variable": _VARIABLE, **definitions},
    }


def _convert_model(schema: dict[str, Any], models: dict[str, Any], is_job: bool) -> dict[str, Any]:
    """Convert pydantic's schema of a section or job.

    A section that has required keys is required itself.
    """
    required = set(schema.get("required", ()))
    properties = {}
    for name, value in schema["properties"].items():
        # A value, or a reference to a section.
        reference = value.get("$ref")
        if reference is None:
            properties[name] = _convert_value(value)
            continue
        properties[name] = {"description": value["description"], "allOf": [{"$ref": reference}]}
        if models[reference.rsplit("/", 1)[-1]].get("required"):
            required.add(name)

    if is_job:
        properties["kind"] = {"enum": [schema["properties"]["kind"]["const"]]}

    # A section with nothing below it is null in YAML and has its defaults.
    types = "object" if required else ["object", "null"]
    return {"type": types, "additionalProperties": False, "properties": properties, "required": sorted(required)}


def _convert_value(schema: dict[str, Any]) -> dict[str, Any]:
    """Convert pydantic's schema of a value.

    The value may be a variable of the environment too.
    """
    about = {name: schema[name] for name in ("description", "default") if name in schema}
    value = _convert_words({name: part for name, part in schema.items() if name not in about})
    choices = value.pop("anyOf", None) or [value]

    # A key that may be null takes empty text for null.
    if {"type": "null"} in choices:
        for choice in choices:
            choice.pop("minLength", None)

    # Text of any form allows a variable anyway.
    if not any(_is_free_text(choice) for choice in choices):
        choices.append({"$ref": "#/definitions/variable"})
    return about | ({"anyOf": choices} if len(choices) > 1 else choices[0])


def _is_free_text(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "string" and not schema.keys() & {"enum", "pattern"}


def _convert_words(schema: Any) -> Any:
    """Convert pydantic's words to those of draft 7, without titles."""
    if isinstance(schema, list):
        return [_convert_words(part) for part in schema]
    if not isinstance(schema, dict):
        return schema

    words = {_LIMITS.get(name, name): _convert_words(part) for name, part in schema.items() if name != "title"}
    if "prefixItems" in words:
        words["items"] = words.pop("prefixItems")
    return words


def _add_searchable_keys(tune: dict[str, Any]) -> None:
    """Add the keys that a search may vary.

    An editor completes them.
    """
    search = tune["properties"]["search"]["anyOf"][0]
    search["properties"] = {}
    for path, field in list_keys(ColabatorJob).items():
        if "." in path and not find_section(field):
            search["properties"][path] = {"description": field.description}
    search["additionalProperties"] = {"type": ["object", "array"]}
