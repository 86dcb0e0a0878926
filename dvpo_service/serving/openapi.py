"""The OpenAPI schema of the gateway, and ``/docs``, the page that shows it without the internet.

Every address in them is relative, so that both work behind a proxy's sub-path.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from dvpo_service.serving.errors import ErrorBody

BEARER = HTTPBearer(auto_error=False, description="the server's API key, if it asks for one")
ASSETS = "docs-assets"
JSON, EVENTS = "application/json", "text/event-stream"
REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is wrong; the message says what",
    401: "No valid API key",
    404: "No such model",
    413: "The body is too large",
    429: "Too many requests are under way",
    501: "This run has no critic",
    503: "No replica can take the request now",
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return ``responses`` for a route that answers with these codes when something is wrong."""
    return {code: {"model": ErrorBody, "description": ERRORS[code]} for code in codes}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return ``openapi_extra`` for a route that reads its body itself, and checks that it is a ``model``."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


def add_schema(app: FastAPI, *bodies: type[BaseModel]) -> None:
    """Add the schemas of ``bodies`` to the app's OpenAPI schema, so that ``json_body`` can refer to them.

    Call this when every route has been added.
    """
    components = app.openapi()["components"]["schemas"]
    for model in bodies:
        schema = model.model_json_schema(ref_template=REFERENCE)
        components |= schema.pop("$defs", {}) | {model.__name__: schema}


def add_docs(app: FastAPI) -> None:
    """Serve ``/docs`` with Swagger UI's files from the package fastapi-offline."""
    files = resources.files("fastapi_offline") / "static"
    app.mount(f"/{ASSETS}", StaticFiles(directory=str(files)))

    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: API",
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
