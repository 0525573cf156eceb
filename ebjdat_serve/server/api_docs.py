"""/docs and /redoc from files of this server: FastAPI's own pages load scripts, fonts and icons from other hosts."""

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from ebjdat_serve.server.settings import Settings

ASSETS = Path(str(files("fastapi_offline"))) / "static"
"""Swagger UI (Apache-2.0) and ReDoc (MIT), as the package fastapi-offline (MIT) carries them."""
BASE = "docs-assets"
DOCS, REDOC, SCHEMA = PATHS = ("/docs", "/redoc", "/openapi.json")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the pages: whatever those scripts would like to load, the browser asks this server alone."""


def prefix_of(settings: Settings) -> str:
    """Return --root-path, under which a proxy serves this server, as "/a/b", or "" for none."""
    path = settings.root_path.strip().strip("/")
    return f"/{path}" if path else ""


def install(app: FastAPI, settings: Settings) -> None:
    """Replace the documentation pages of ``app``; every address in them is relative, so a path prefix is kept."""
    if prefix := prefix_of(settings):
        app.servers = [{"url": prefix}]
    theirs = {app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in theirs]
    app.mount(f"/{BASE}", StaticFiles(directory=ASSETS), name=BASE)
    icon = f"{BASE}/favicon.png"

    @app.get(DOCS, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return guarded(
            get_swagger_ui_html(
                openapi_url=SCHEMA.removeprefix("/"),
                title=app.title,
                swagger_js_url=f"{BASE}/swagger-ui-bundle.js",
                swagger_css_url=f"{BASE}/swagger-ui.css",
                swagger_favicon_url=icon,
                swagger_ui_parameters={"validatorUrl": None},  # by default it sends the schema's address to validator.swagger.io
            )
        )

    @app.get(REDOC, include_in_schema=False)
    async def redoc() -> HTMLResponse:
        return guarded(
            get_redoc_html(
                openapi_url=SCHEMA.removeprefix("/"),
                title=app.title,
                redoc_js_url=f"{BASE}/redoc.standalone.js",
                redoc_favicon_url=icon,
                with_google_fonts=False,
            )
        )


def guarded(page: HTMLResponse) -> HTMLResponse:
    """Return ``page`` with the policy that keeps it to this server."""
    page.headers["Content-Security-Policy"] = POLICY
    return page
