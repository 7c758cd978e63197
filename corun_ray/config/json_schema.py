"""Job files as a JSON schema (draft 7, which editors' YAML servers know best)."""

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from corun_ray.config.jobs import KINDS, ColabatorJob
from corun_ray.config.reference import find_section, list_keys

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
    """The schema as `corun-ray schema` prints it."""
    return json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"


def build_schema() -> dict[str, Any]:
    """What one YAML document of a job file may say, by its kind.

    Any value may be `${VAR}`; what goes together with what, only `corun-ray check` knows.
    """
    references, tree = models_json_schema([(job, "validation") for job in KINDS.values()], ref_template=_REF)
    definitions: dict[str, Any] = {
        name: _model(schema, tree["$defs"], is_job="kind" in schema["properties"])
        for name, schema in tree["$defs"].items()
    }
    _tell_searchable_keys(definitions["TuneSection"])
    is_kind = [
        {
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": references[job, "validation"],
        }
        for kind, job in KINDS.items()
    ]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A job of corun_ray",
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": [*KINDS], "description": "what the job does"}},
        "allOf": is_kind,
        "definitions": {"variable": _VARIABLE, **definitions},
    }


def _model(schema: dict[str, Any], models: dict[str, Any], is_job: bool) -> dict[str, Any]:
    """A section or job; it needs each of its sections that has keys to be given."""
    sections = {
        name: value["$ref"].rsplit("/", 1)[-1] for name, value in schema["properties"].items() if "$ref" in value
    }
    needed = {name for name, model in sections.items() if models[model].get("required")}
    properties = {
        name: {"description": value["description"], "allOf": [{"$ref": value["$ref"]}]}
        if name in sections
        else _value(value)
        for name, value in schema["properties"].items()
    }
    if is_job:
        properties["kind"] = {"enum": [schema["properties"]["kind"]["const"]]}
    required = sorted({*schema.get("required", ()), *needed})
    kinds = "object" if required else ["object", "null"]  # a section with nothing below it has its defaults
    return {"type": kinds, "additionalProperties": False, "properties": properties, "required": required}


def _value(schema: dict[str, Any]) -> dict[str, Any]:
    """A key's value as pydantic has it, or a variable of the environment."""
    told = {name: schema[name] for name in ("description", "default") if name in schema}
    value = _plain({name: part for name, part in schema.items() if name not in told})
    choices = value.pop("anyOf", None) or [value]
    if {"type": "null"} in choices:  # such a key takes empty text for null
        choices = [{name: part for name, part in choice.items() if name != "minLength"} for choice in choices]
    if not any(choice.get("type") == "string" and not choice.keys() & {"enum", "pattern"} for choice in choices):
        choices.append({"$ref": "#/definitions/variable"})
    return told | ({"anyOf": choices} if len(choices) > 1 else choices[0])


def _plain(schema: Any) -> Any:
    """Draft 7 words for pydantic's, without its titles."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {_LIMITS.get(name, name): _plain(part) for name, part in schema.items() if name != "title"}
    if "prefixItems" in plain:
        plain["items"] = plain.pop("prefixItems")
    return plain


def _tell_searchable_keys(tune: dict[str, Any]) -> None:
    """Lets an editor complete the keys that a search may vary."""
    search = tune["properties"]["search"]["anyOf"][0]
    searchable = {
        path: field for path, field in list_keys(ColabatorJob).items() if "." in path and not find_section(field)
    }
    search["properties"] = {path: {"description": field.description} for path, field in searchable.items()}
    search["additionalProperties"] = {"type": ["object", "array"]}
