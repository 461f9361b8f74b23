"""A page in the browser: your own photo, your own words, and the masks as you type.

    python run.py serve

Prints the address to open. Images stay in memory; nothing is written to disk, and only this machine can reach the
page without --host. Needs starlette and uvicorn: pip install -r requirements-web.txt
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys

from maskclip_jax.cli import common
from maskclip_jax.data.whole_files import reason
from maskclip_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    parser.add_argument(
        "--more-models", nargs="+", metavar="MODEL", help="what else the page's list offers, CLIPs and students"
    )
    parser.add_argument("--affinity", metavar="NAME", help="second backbone for proxyclip, clip_dinoiser and lposs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is reached from outside")
    parser.add_argument(
        "--host-name",
        nargs="+",
        metavar="NAME",
        help="names that the page is opened by, beside addresses and this host's",
    )
    parser.add_argument("--port", type=port, default=7860, help="port to listen on; 0 takes any free one")
    parser.add_argument("--max-upload", type=common.positive, default=20, metavar="MB", help="of an image file")
    parser.add_argument("--max-pixels", type=common.positive, default=50_000_000, metavar="N", help="of an image")
    parser.add_argument(
        "--memory", type=common.positive, default=512, metavar="MB", help="for the features of the last images"
    )


def port(text: str) -> int:
    """An argument from 0 to 65535."""
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text!r}")


def run(args: argparse.Namespace) -> int:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs starlette and uvicorn, but {error.name} is not installed: "
            "pip install -r requirements-web.txt (or 'maskclip-jax[web]')"
        ) from error
    from maskclip_jax.cli.process import give_back_after_compiling
    from maskclip_jax.web import warmup
    from maskclip_jax.web.intake import make_server
    from maskclip_jax.web.server import is_loopback, make_app
    from maskclip_jax.web.session import MEGABYTE, Session

    with listening(args.host, args.port) as listener:  # first of all, so that a taken port is known at once
        give_back_after_compiling()  # it runs for weeks, and compiles for every new kind of question
        session = Session(make_models(args), keep=args.memory * MEGABYTE, most_pixels=args.max_pixels)
        steps = list(warmup.steps(session))
        with common.progress("warming up", len(steps)) as report:
            for done, step in enumerate(steps, 1):
                step()
                report(done)
        names = args.host_name or ()
        app = make_app(session, host=args.host, names=names, most_upload=args.max_upload * MEGABYTE)
        if not is_loopback(args.host):
            common.complain(f"anyone who can reach {args.host} can use this page", "warning")
        host, number = listener.getsockname()[:2]
        print(f"open http://{f'[{host}]' if ':' in host else host}:{number} (Ctrl-C stops)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has answered whom it had to, and passes the signal on
            make_server(app).run(sockets=[listener])
        print("stopped", file=sys.stderr)
    return 0


def make_models(args: argparse.Namespace):
    """The models of the page's list: `--model` first and loaded, the others when they are picked."""
    from maskclip_jax.checkpoints.load import EMBEDDED
    from maskclip_jax.distill import is_student
    from maskclip_jax.segment.paired import loaded_backbone
    from maskclip_jax.web.models import Models

    if is_student(args.model):
        common.refuse_for_students(args, ())

    def load(name: str):
        if is_student(name):
            checkpoint = args.checkpoint if name == args.model else None
            return common.load_run(argparse.Namespace(model=name, checkpoint=checkpoint))
        own = vars(args) | {"model": name}
        if name != args.model:  # what was said of --model need not fit the others
            own |= {"dense_stride": None, "tokenizer": None, "checkpoint": None, "activation": None}
        return common.load_model(argparse.Namespace(**own))

    models = Models([args.model, *(args.more_models or ()), *EMBEDDED], load, args.affinity)
    # the page asks for students' classes at once
    for name in (args.model, *filter(is_student, args.more_models or ())):
        models.reader(name)
    if args.affinity is not None:  # one that cannot be read stops the server, not a visitor
        loaded_backbone(args.affinity)
    return models


def listening(host: str, number: int) -> socket.socket:
    """A socket that listens there. Raises UserError where none can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # gaierror is one; the other comes of names that no host may have
        raise UserError(
            f"--host is an address of this machine, but {host!r} is none ({reason(error)}): try 127.0.0.1"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just stopped is no hindrance
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"the port must be free, but {host}:{number} cannot be had ({error.strerror}): choose another with --port"
        ) from error
    return listener
