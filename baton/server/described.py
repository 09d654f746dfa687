"""Described: what /openapi.json says about answers: their kinds of content, and the form of errors.

FastAPI describes what comes in. It takes every answer for JSON, and announces a 422 that is never sent.
"""

from typing import Any

from fastapi import FastAPI

from baton.server import bodies

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
KINDS: dict[str, tuple[str, ...]] = {
    "/metrics": (TEXT,),
    "/timeline": (EVENTS,),
    bodies.Path.LOAD_ADAPTER: (TEXT,),
    bodies.Path.UNLOAD_ADAPTER: (TEXT,),
}
STREAMED = bodies.GENERATING - {bodies.Path.EMBEDDINGS}
"""JSON, or events if the request asks for a stream."""
UNSENT = "422"
FRAMEWORKS = ("HTTPValidationError", "ValidationError")  # what that would hold
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip


def describe_answers(app: FastAPI) -> None:
    """Call it once all routes are there."""
    own = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema
        return completed(own()) if known is None else known

    app.openapi = openapi  # type: ignore[method-assign]


def completed(spec: dict[str, Any]) -> dict[str, Any]:
    """The same description, with its answers."""
    for path, methods in spec["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            responses.pop(UNSENT, None)
            responses["default"] = {"description": "An error", "content": {JSON: {"schema": ERROR}}}
            content = responses["200"].get("content", {})
            if path in KINDS:
                responses["200"]["content"] = {kind: {} for kind in KINDS[path]}
            elif path in STREAMED:
                content[EVENTS] = {}
    for name in FRAMEWORKS:
        spec.get("components", {}).get("schemas", {}).pop(name, None)
    return spec
