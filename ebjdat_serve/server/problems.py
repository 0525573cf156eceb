"""Errors as RFC 9457 problem documents: what is wrong, which limit or fix, and never a traceback."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from ebjdat_serve.server.api_docs import prefix_of
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.v2_protocol import is_v2

TITLES = {
    400: "Bad request",
    401: "No valid API key",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Request too slow",
    409: "Not with this model",
    413: "Too large",
    414: "Target too long",
    415: "Unsupported content type",
    417: "Expectation failed",
    421: "Misdirected request",
    422: "Invalid input",
    429: "Too much at once",
    431: "Headers too large",
    499: "Client closed the connection",
    500: "Internal error",
    503: "Busy",
    504: "Deadline exceeded",
}


class ProblemDocument(BaseModel):
    """RFC 9457."""

    title: str
    status: int
    detail: str
    index: Annotated[int | None, Field(description="of the invalid image in a list; absent otherwise")] = None


refused: Counter[int] = Counter()
"""Responses of Problem.last_response, to requests that were refused before they were whole, by status."""
MEDIA_TYPE = "application/problem+json"
SCHEMA = ProblemDocument.model_json_schema()


class Problem(Exception):
    """An error response: HTTP status, a sentence that names the limit or the fix, headers, and further fields of ProblemDocument.

    ``public`` takes the place of a ``detail`` that tells the server's load, which the public profile keeps to itself.
    """

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None, public: str = "", **extra: Any) -> None:
        detail = detail.encode("utf-8", "backslashreplace").decode()  # JSON of a client may hold half a character, which no answer can
        super().__init__(detail)
        self.status, self.detail, self.headers, self.public, self.extra = status, detail, headers, public, extra

    def document(self) -> str:
        """Return the ProblemDocument as JSON."""
        title = TITLES.get(self.status, "Error")
        return ProblemDocument(title=title, status=self.status, detail=self.detail, **self.extra).model_dump_json(exclude_unset=True)

    def response(self) -> Response:
        """Return the problem as a response."""
        return Response(self.document(), self.status, headers=self.headers, media_type=MEDIA_TYPE)

    def note(self, scope: Any) -> None:
        """Note that a request, which the app reads, is refused by its connection: it is counted and logged as such."""
        if trace := scope.get("trace"):
            trace.refused = self.status

    def last_response(self, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the problem as the bytes of a response that ends its connection, and count it in ``refused``."""
        refused[self.status] += 1
        body = self.document().encode()
        own = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), "cache-control": "no-store", "connection": "close"}
        headers = [*default_headers, *((name.encode(), value.encode()) for name, value in (own | (self.headers or {})).items())]
        return b"".join([STATUS_LINE[self.status], *(b"%b: %b\r\n" % header for header in headers), b"\r\n", body])


def install(app: FastAPI, settings: Settings) -> None:
    """Make every error of ``app`` a problem document."""
    prefix = prefix_of(settings)
    docs = f"{prefix}/docs"

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        if error.public and settings.profile_for(request.scope) == "public":
            error.detail = error.public
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        if error.status_code == 404:
            return Problem(404, f"no such path {path}; see {docs}").response()
        if error.status_code == 405:
            allowed = ", ".join(sorted(methods_of(app, path)))
            return Problem(405, f"{path} does not take {request.method}; use {allowed}", headers={"Allow": allowed}).response()
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, __: Exception) -> Response:
        # this response passes no middleware
        detail = "the server failed on this request; its log has the cause"
        v2 = is_v2(request.scope["path"].removeprefix(prefix))
        response = v2_error(500, detail) if v2 else Problem(500, detail, headers={"Cache-Control": "no-store"}).response()
        if trace := request.scope.get("trace"):
            response.raw_headers += trace.headers
        return response


def v2_error(status: int, detail: str) -> Response:
    """Return an error as clients of the Open Inference Protocol v2 read it; the protocol has 400 for what is invalid in any way."""
    return JSONResponse({"error": detail}, 400 if status == 422 else status)


def methods_of(app: FastAPI, path: str) -> set[str]:
    """Return the methods of every route at ``path``; HEAD is where GET is."""
    methods = {method for route in app.routes if getattr(route, "path", None) == path for method in getattr(route, "methods", ())}
    return methods | ({"HEAD"} if "GET" in methods else set())
