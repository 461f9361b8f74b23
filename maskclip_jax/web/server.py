"""The HTTP server: routes, limits, error messages; one request is computed at a time.

    GET  /                             the page
    GET  /api/options                  what there is to choose from
    GET  /api/scenes/0005.jpg          a shipped scene
    POST /api/images?name=photo.jpg    an image file as the body       -> {"image": its name here, …}
    GET  /api/images/NAME              the image as the model is shown it
    POST /api/segment                  a `request.SegmentRequest` as JSON -> classes, areas, confidences, paths of files
    GET  /api/answers/NAME/labels.png  and result.json, overlay.png: the files that `segment` writes
    GET  /api/answers/NAME/coco.zip    and the other formats of `downloads.FORMATS`: what `export` writes
    GET  /api/answers/NAME/heat/0.png  the heat map of class 0

Whatever cannot be done is answered by {"error": one line} and a status above 399.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskclip_jax.data.vocabulary import class_set, class_set_names
from maskclip_jax.data.whole_files import json_text, shipped
from maskclip_jax.errors import UserError
from maskclip_jax.web.intake import Busy, Intake, Slow, TooLarge
from maskclip_jax.web.limits import PROGRAM_BYTES, Programs
from maskclip_jax.web.request import ASKING, METHODS, MOST_CLASSES, read_request
from maskclip_jax.web.session import MEGABYTE, File, Gone, Session, scene_names

T = TypeVar("T")

QUESTION_BYTES = 2**18
MOST_WAITING = 64  # requests in the queue; the next one is refused
BODIES = 4  # bodies of the largest size in memory at once, finished or not
LONGEST_ERROR = 400  # characters
PAGE = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.js", "compare.js", "drawing.js", "legend.js", "words.js", "page.css")
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {  # nothing from outside is loaded, and nobody else's page may frame this one
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # photos are not left in the browser's cache either
}


class Foreign(UserError):
    """A request that another site's page made."""


STATUS: dict[type[UserError], int] = {Gone: 404, TooLarge: 413, Busy: 503, Foreign: 403, Slow: 408}


class Turns:
    """First come, first served, one at a time: JAX uses all cores for one visitor as it is."""

    def __init__(self, most: int = MOST_WAITING):
        self._most, self._waiting = most, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """Waits for its turn. Raises `Busy` when the queue is too long."""
        if self._waiting >= self._most:
            raise Busy(f"at most {self._most} requests wait here, and they do: try again in a moment")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finishes what has begun, and drops what waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class Guard:
    """Refuses what other sites' pages send, and puts `HEADERS` on every answer.

    A server on the loopback address is within reach of every page its user opens: such a page's requests bear its
    `Origin`, and where it makes its own host name point here, they bear that name as `Host`. The same goes for a
    server in a local network. So `Host` is an address (no name can be made to be one), or a name that is known here.
    """

    def __init__(self, app: ASGIApp, host: str, names: Sequence[str] = ()):
        self.app, self.loopback = app, is_loopback(host)
        self.names = {name.lower() for name in names}
        if not self.loopback:
            own = socket.gethostname().lower()
            short = own.partition(".")[0]
            self.names |= {host.lower(), "localhost", own, short, f"{short}.local"}

    def is_known(self, host: str) -> bool:
        """Whether a request may bear that host name."""
        return host in self.names or (is_loopback(host) if self.loopback else is_address(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        headers = Request(scope).headers
        here, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_known(host_name(here)):
            place = "127.0.0.1 or localhost" if self.loopback else "this machine's address"
            remedy = "open it there, or start it with --host-name NAME"
            answer = failure(Foreign(f"this page is at {place}, not at {here}: {remedy}"))
        elif origin is not None and authority(origin) != here.lower():
            answer = failure(Foreign(f"pages of other sites may not ask here, but {origin} did: use the page itself"))
        else:
            return await self.app(scope, receive, with_headers)
        await answer(scope, receive, with_headers)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def host_name(authority: str) -> str:
    """ "localhost:7860" -> "localhost", "[::1]:7860" -> "::1"; empty where there is none."""
    with contextlib.suppress(ValueError):
        return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    return ""


def authority(origin: str) -> str:
    """ "http://localhost:7860" -> "localhost:7860"; empty where that cannot be read."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc.lower()
    return ""


def failure(error: UserError) -> JSONResponse:
    """{"error": …}, on one line that has an end, in characters that JSON takes."""
    line = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    line = line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + "…"
    return JSONResponse({"error": line}, STATUS.get(type(error), 400))


def make_app(
    session: Session,
    *,
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    most_upload: int = 20 * MEGABYTE,
    program_bytes: int = PROGRAM_BYTES,
) -> Starlette:
    """The application. `host` is what it is bound to, `names` what else it is called, `most_upload` bytes of an image
    file, `program_bytes` what compiled programs may take."""
    turns, intake = Turns(), Intake(BODIES * max(most_upload, QUESTION_BYTES))
    programs = Programs(room=program_bytes, kept=lambda: session.nbytes)

    def done(work: Callable[..., T], *args: Any) -> T:
        programs.make_room()
        return work(*args)

    async def page(request: Request) -> Response:
        file = static_folder() / PAGE[request.url.path]
        return Response(file.read_bytes(), media_type=TYPES[file.suffix])

    async def options(request: Request) -> Response:
        return json_answer(choices(session, most_upload))

    async def scene(request: Request) -> Response:
        return sent(await turns(done, session.scene, request.path_params["name"]))

    async def receive(request: Request) -> Response:
        name = clean_name(request.query_params.get("name", ""))
        async with intake.body_of(request, most_upload, "an image file") as data:
            return json_answer(await turns(done, session.receive, data, name))

    async def picture(request: Request) -> Response:
        return sent(await turns(done, session.picture, request.path_params["token"]))

    async def segment(request: Request) -> Response:
        async with intake.body_of(request, QUESTION_BYTES, "a question") as data:
            wanted = read_request(data, session.models.affinity)
        return json_answer(await turns(done, session.segment, wanted))

    async def file(request: Request) -> Response:
        return sent(await turns(done, session.file, request.path_params["token"], request.path_params["kind"]))

    async def heat(request: Request) -> Response:
        index = request.path_params["index"]
        if not (index.isascii() and index.isdecimal() and len(index) < 6):
            raise Gone(f"a class is a number, got {index[:20]}: choose one")
        return sent(await turns(done, session.heat, request.path_params["token"], int(index)))

    async def user_error(request: Request, error: Exception) -> Response:
        return failure(error)

    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse(
            {"error": f"there is no {request.method} {request.url.path[:100]} here: see docs/guides/serve.md"}, 404
        )

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "this is a fault of the server: its terminal has the details"}, 500)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # the client is gone

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        turns.close()
        programs.close()

    routes = [
        *(Route(path, page) for path in PAGE),
        Route("/api/options", options),
        Route("/api/scenes/{name}.jpg", scene),
        Route("/api/images", receive, methods=["POST"]),
        Route("/api/images/{token}", picture),
        Route("/api/segment", segment, methods=["POST"]),
        Route("/api/answers/{token}/heat/{index}.png", heat),
        Route("/api/answers/{token}/{kind}", file),
    ]
    handlers = {UserError: user_error, ClientDisconnect: gone, 404: unknown, 405: unknown, Exception: broken}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.add_middleware(Guard, host=host, names=names)
    return app


def clean_name(name: str) -> str:
    """A file's name as a visitor's machine has it, for messages and downloads: one line, no folders."""
    name = "".join(letter for letter in Path(name.replace("\\", "/")).name if letter.isprintable()).strip(". ")
    stem, dot, suffix = name.rpartition(".")
    return f"{stem[:80]}{dot}{suffix[:10]}" if dot else name[:80] or "photo"


def choices(session: Session, most_upload: int) -> dict[str, Any]:
    """What the page offers."""
    sets = {name: [", ".join(entry) for entry in class_set(name)] for name in class_set_names()}
    return {
        "models": list(session.models.names),
        "methods": [*METHODS, *(ASKING if session.models.affinity else ())],
        "students": session.models.students(),
        "scenes": list(scene_names()),
        "class_sets": {name: words for name, words in sets.items() if len(words) < MOST_CLASSES},
        "prompt_denoising": session.models.recommended_denoising(session.models.names[0]),
        "limits": {"upload": most_upload, "pixels": session.most_pixels, "classes": MOST_CLASSES},
    }


def static_folder() -> Path:
    """Where the page's files lie."""
    return shipped("web", "static")


def json_answer(obj: Any) -> Response:
    """JSON as `segment` writes it: indented, NaN as null."""
    return Response(json_text(obj), media_type="application/json")


def sent(file: File) -> Response:
    """A file; one with a name is to be saved under it."""
    headers = {} if file.name is None else {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name)}"}
    return Response(file.data, media_type=file.type, headers=headers)
