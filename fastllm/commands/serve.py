"""Try trained models on a local web page: text as it is written, translations, labels, answers in their text."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from ..config import InputError
from ..training.checkpoints.model_folder import model_folder
from ..training.config import DEVICES
from ._model import load_for, task_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="FOLDER", help="runs or models, at most one for each task; the task is the model's"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="seconds that a request may take (default: %(default)s)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before any model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(64)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        listener.close()
        raise InputError(f"port {port} on {host}: {getattr(error, 'strerror', None) or error}") from error
    return listener


def run(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn

        from ..serving.app import TASKS, ServedModel, make_app
        from ..serving.connection import Connection
    except ImportError as error:
        raise InputError("serving needs Starlette and uvicorn: pip install 'fastllm[serve]'") from error
    if not 0 < arguments.seconds < float("inf"):
        raise InputError(f"seconds: expected more than 0, got {arguments.seconds}")
    folders = [model_folder(Path(name)) for name in arguments.models]
    listener = _listen(arguments.host, arguments.port)
    with listener:
        served = {}
        for folder in folders:
            model, tokenizer = load_for(folder, arguments.device)
            task = task_of(model.config)
            if task not in TASKS:
                raise InputError(f"{folder}: an encoder without a task cannot be served; fine-tune it first")
            if task in served:
                raise InputError(f"{folder}: a second model for {task}; one for each task can be served")
            served[task] = ServedModel(model, tokenizer)
        port = listener.getsockname()[1]
        hosts = (arguments.host, "localhost", "127.0.0.1", "::1")
        print(f"serving {', '.join(served)} on http://{arguments.host}:{port} (Ctrl-C ends)", flush=True)
        app = make_app(served, hosts, arguments.seconds)
        config = uvicorn.Config(
            app, http=Connection, log_level="warning", timeout_keep_alive=5, limit_concurrency=64, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0
