"""As much of JSON Schema (draft 2020-12) as docs/bench.schema.json uses; a keyword beyond that is an error here."""

import json
from pathlib import Path

BENCH = json.loads(Path(__file__).parents[1].joinpath("docs", "bench.schema.json").read_text(encoding="utf-8"))
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip
NOTES = {"$schema", "$id", "$defs", "title", "description"}


def _is(value, name):
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def problems(value, schema, root=None, at="$"):
    """What in ``value`` the schema does not allow: a line each, with its place."""
    root = root or schema
    unknown = schema.keys() - NOTES - {
        "type", "const", "enum", "required", "properties", "additionalProperties", "items", "minItems", "maxItems",
        "minimum", "maximum", "$ref",
    }  # fmt: skip
    if unknown:
        raise NotImplementedError(f"{at}: {unknown}")
    if "$ref" in schema:
        return problems(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(_is(value, name) for name in names):
        return [f"{at}: {value!r} is not of type {' or '.join(names)}"]
    found = []
    if value != schema.get("const", value):
        found.append(f"{at}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if _is(value, "number") and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{at}: {value!r} is out of range")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{at}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            part = known.get(name, rest)
            if part is False:
                found.append(f"{at}: {name} is not in the schema")
            elif part is not True:
                found += problems(item, part, root, f"{at}.{name}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{at}: {len(value)} items")
        for i, item in enumerate(value):
            found += problems(item, schema.get("items", {}), root, f"{at}[{i}]")
    return found
