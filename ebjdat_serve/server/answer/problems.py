"""Errors as RFC 9457 problem documents: what is wrong, which limit or fix, and never a traceback."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TITLES = {
    400: "Bad request",
    401: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Body too slow",
    413: "Too large",
    415: "Unsupported content type",
    422: "Invalid input",
    429: "Too much at once",
    500: "Internal error",
    503: "Busy",
    504: "Deadline exceeded",
}


class Problem(Exception):
    """An answer that is an error: HTTP status, a sentence that names the limit or the fix, and extra fields."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: object) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.extra = status, detail, headers, extra


def install(app: FastAPI) -> None:
    """Make every error of ``app`` a problem document."""

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return document(error.status, error.detail, error.headers, **error.extra)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return document(422, explain(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"no such path {request.scope['path']}; see /docs"
        if error.status_code == 405:
            allowed = ", ".join(sorted(methods_of(app, request.scope["path"])))
            detail = f"{request.scope['path']} does not take {request.method}; use {allowed}"
            return document(405, detail, {"Allow": allowed})
        return document(error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        return document(500, "the server failed on this request; its log has the cause")


def methods_of(app: FastAPI, path: str) -> set[str]:
    """Return the methods of every route at ``path``."""
    return {method for route in app.routes if getattr(route, "path", None) == path for method in getattr(route, "methods", ())}


def document(status: int, detail: str, headers: dict[str, str] | None = None, **extra: object) -> JSONResponse:
    """Return the problem document."""
    return JSONResponse(content(status, detail, **extra), status, headers=headers, media_type="application/problem+json")


def content(status: int, detail: str, **extra: object) -> dict[str, object]:
    """Return the problem document's content."""
    return {"title": TITLES.get(status, "Error"), "status": status, "detail": detail, **extra}


def explain(error: RequestValidationError) -> str:
    """Return pydantic's findings as one readable line."""
    found = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if part not in ("query", "body", "str", "int"))
        if item["type"] == "extra_forbidden":
            found.append(f"{place[:40]} is unknown; known are class, n, steps, step_size, temperature, seed, format, scale, stream, every")
            continue
        found.append(f"{place}: {item['msg']}" if place else item["msg"])
    return "; ".join(found)
