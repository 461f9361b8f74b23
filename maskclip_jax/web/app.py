"""HTTP: routes, limits, messages, and one visitor after the other.

    GET  /                             the page
    GET  /api/options                  what there is to choose from
    GET  /api/scenes/0005.jpg          a shipped scene
    POST /api/images?name=photo.jpg    an image file as the body       -> {"image": its name here, …}
    GET  /api/images/NAME              the image as the model is shown it
    POST /api/segment                  a question (`ask.Ask`) as JSON  -> classes, areas, confidences, paths of files
    GET  /api/answers/NAME/labels.png  and result.json, overlay.png: the files that `segment` writes
    GET  /api/answers/NAME/heat/0.png  the heat map of class 0

Whatever cannot be done is answered by {"error": one line} and a status above 399.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskclip_jax.data.images import json_text
from maskclip_jax.data.vocabulary import class_set, class_set_names
from maskclip_jax.errors import UserError
from maskclip_jax.web.ask import METHODS, MOST_CLASSES, read_ask
from maskclip_jax.web.desk import MEGABYTE, Desk, File, Gone, scene_names

T = TypeVar("T")

QUESTION_BYTES = 2**18
MOST_WAITING = 64  # visitors in line; the next one is asked to come back
PAGE = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.js", "drawing.js", "legend.js", "words.js", "page.css")
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {  # nothing from outside is loaded, and nobody else's page may frame this one
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",  # photos are not left in the browser's cache either
}


class Busy(UserError):
    """Too many are waiting."""


class TooLarge(UserError):
    """A body over the limit."""


class Foreign(UserError):
    """A request that another site's page made."""


STATUS: dict[type[UserError], int] = {Gone: 404, TooLarge: 413, Busy: 503, Foreign: 403}


class Turns:
    """First come, first served, one at a time: JAX uses all cores for one visitor as it is."""

    def __init__(self, most: int = MOST_WAITING):
        self._most, self._waiting = most, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """Waits for its turn. Raises `Busy` when the line is too long."""
        if self._waiting >= self._most:
            raise Busy(f"at most {self._most} requests wait here, and they do: try again in a moment")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finishes what has begun, and forgets what waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class Guard:
    """Refuses what other sites' pages send, and puts `HEADERS` on every answer.

    A server on the loopback address is within reach of every page its user opens: such a page's requests bear its
    `Origin`, and where it makes its own host name point here, they bear that name as `Host`.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app, self.loopback = app, is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        headers = Request(scope).headers
        here, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and not is_loopback(host_name(here)):
            answer = failure(Foreign(f"this page is at 127.0.0.1 or localhost, not at {here}: open it there"))
        elif origin is not None and urlsplit(origin).netloc != here:
            answer = failure(Foreign(f"pages of other sites may not ask here, but {origin} did: use the page itself"))
        else:
            return await self.app(scope, receive, with_headers)
        await answer(scope, receive, with_headers)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, seen from itself alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def host_name(authority: str) -> str:
    """ "localhost:7860" -> "localhost", "[::1]:7860" -> "::1"; empty where there is none."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{authority}").hostname or ""
    return ""


def failure(error: UserError) -> JSONResponse:
    """{"error": …}, on one line."""
    return JSONResponse({"error": " ".join(str(error).split())}, STATUS.get(type(error), 400))


def make_app(desk: Desk, *, host: str = "127.0.0.1", most_upload: int = 20 * MEGABYTE) -> Starlette:
    """The application. `host` is what it is bound to, `most_upload` the bytes of an image file."""
    turns = Turns()

    async def page(request: Request) -> Response:
        file = static_folder() / PAGE[request.url.path]
        return Response(file.read_bytes(), media_type=TYPES[file.suffix])

    async def options(request: Request) -> Response:
        return json_answer(choices(desk, most_upload))

    async def scene(request: Request) -> Response:
        return sent(await turns(desk.scene, request.path_params["name"]))

    async def receive(request: Request) -> Response:
        data = await body_of(request, most_upload, "an image file")
        return json_answer(await turns(desk.receive, data, clean_name(request.query_params.get("name", ""))))

    async def picture(request: Request) -> Response:
        return sent(await turns(desk.picture, request.path_params["token"]))

    async def segment(request: Request) -> Response:
        ask = read_ask(await body_of(request, QUESTION_BYTES, "a question"))
        return json_answer(await turns(desk.segment, ask))

    async def file(request: Request) -> Response:
        return sent(await turns(desk.file, request.path_params["token"], request.path_params["kind"]))

    async def heat(request: Request) -> Response:
        return sent(await turns(desk.heat, request.path_params["token"], request.path_params["index"]))

    async def user_error(request: Request, error: Exception) -> Response:
        return failure(error)

    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"there is no {request.method} {request.url.path} here: see the README"}, 404)

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "this is a fault of the server, not yours: its terminal says more"}, 500)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        turns.close()

    routes = [
        *(Route(path, page) for path in PAGE),
        Route("/api/options", options),
        Route("/api/scenes/{name}.jpg", scene),
        Route("/api/images", receive, methods=["POST"]),
        Route("/api/images/{token}", picture),
        Route("/api/segment", segment, methods=["POST"]),
        Route("/api/answers/{token}/heat/{index:int}.png", heat),
        Route("/api/answers/{token}/{kind}", file),
    ]
    handlers = {UserError: user_error, ClientDisconnect: gone, 404: unknown, 405: unknown, Exception: broken}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.add_middleware(Guard, host=host)
    return app


async def body_of(request: Request, most: int, what: str) -> bytes:
    """The body, in memory. Raises `TooLarge` past `most` bytes.

    What is a little too large is read to its end all the same: a browser that is still sending would otherwise report
    a lost connection instead of the message.
    """
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            parts.append(chunk)
        else:
            parts.clear()
        if size > 8 * most:
            break
    if size > most:
        raise TooLarge(f"{what} has at most {_size(most)} here, but this one has more: make it smaller")
    return b"".join(parts)


def clean_name(name: str) -> str:
    """A file's name as a visitor's machine has it, for messages and downloads: one line, no folders."""
    name = "".join(letter for letter in Path(name.replace("\\", "/")).name if letter.isprintable()).strip(". ")
    stem, dot, suffix = name.rpartition(".")
    return f"{stem[:80]}{dot}{suffix[:10]}" if dot else name[:80] or "photo"


def choices(desk: Desk, most_upload: int) -> dict[str, Any]:
    """What the page offers."""
    sets = {name: [", ".join(entry) for entry in class_set(name)] for name in class_set_names()}
    return {
        "models": list(desk.shelf.names),
        "methods": list(METHODS),
        "scenes": list(scene_names()),
        "class_sets": {name: words for name, words in sets.items() if len(words) < MOST_CLASSES},
        "prompt_denoising": desk.shelf.recommended_denoising(desk.shelf.names[0]),
        "limits": {"upload": most_upload, "pixels": desk.most_pixels, "classes": MOST_CLASSES},
    }


def static_folder() -> Path:
    """Where the page's files lie."""
    return Path(str(resources.files("maskclip_jax") / "web" / "static"))


def json_answer(obj: Any) -> Response:
    """JSON as `segment` writes it: indented, NaN as null."""
    return Response(json_text(obj), media_type="application/json")


def sent(file: File) -> Response:
    """A file; one with a name is to be saved under it."""
    headers = {} if file.name is None else {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name)}"}
    return Response(file.data, media_type=file.type, headers=headers)


def _size(count: int) -> str:
    return f"{count / MEGABYTE:.3g} MB" if count >= MEGABYTE else f"{count / 1024:.3g} kB"
