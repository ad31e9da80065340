"""The page of /docs: the OpenAPI document as plain HTML, complete in itself, without scripts."""

import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } code, pre { font-family: ui-monospace, monospace; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; } table { border-collapse: collapse; }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #eee; }
.method { display: inline-block; min-width: 4rem; color: #555; }
"""


def docs_page(document: dict[str, Any]) -> str:
    """The page for an OpenAPI document of ours."""
    info = document["info"]
    schemas = document["components"]["schemas"]
    routes = [
        _route(path, method, operation, schemas)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(info['title'])}</h1><p>{escape(info['description'])} "
        f'The same for programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(routes)}</body></html>'
    )


def _route(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [
        f'<h2><span class="method">{escape(method.upper())}</span> <code>{escape(path)}</code></h2>',
        f"<p>{escape(operation['summary'])}</p>",
    ]
    body = operation.get("requestBody")
    if body is not None:
        content = body["content"]["application/json"]
        example = json.dumps(content["example"])
        parts.append(
            f"<pre>curl -N http://localhost:3000{escape(path)} -H 'Content-Type: application/json' \\\n"
            f"  -d '{escape(example, quote=False)}'</pre>"
        )
        parts.append(_fields(_name_of(content["schema"]), schemas))
    statuses = "; ".join(
        f"{escape(status)} {escape(answer['description'])}" for status, answer in operation["responses"].items()
    )
    parts.append(f"<p>Answers: {statuses}.</p>")
    return "".join(parts)


def _name_of(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _fields(name: str, schemas: dict[str, Any]) -> str:
    """A table of a schema's fields, with those of the objects inside it below them."""
    rows: list[str] = []
    _add_rows(rows, "", schemas[name], schemas)
    return f"<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{''.join(rows)}</table>"


def _add_rows(rows: list[str], prefix: str, schema: dict[str, Any], schemas: dict[str, Any]) -> None:
    for field, kind in schema.get("properties", {}).items():
        references = [option for option in [kind, *kind.get("anyOf", [])] if "$ref" in option]
        types = [_type_name(option) for option in kind.get("anyOf", [kind])]
        rows.append(
            f"<tr><td><code>{escape(prefix + field)}</code></td><td>{escape(' or '.join(types))}</td>"
            f"<td>{escape(kind.get('description', ''))}</td></tr>"
        )
        for reference in references:
            _add_rows(rows, f"{prefix}{field}.", schemas[_name_of(reference)], schemas)


def _type_name(kind: dict[str, Any]) -> str:
    return "object" if "$ref" in kind else str(kind.get("type", "any"))
