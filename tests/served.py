"""The web page's application with small models, on a port of its own."""

import json
import queue
import socket
import threading
import time
import urllib.error
import urllib.request

import torch
from cells import dataset
from extras import needed

from fastllm.models import ModelConfig, build_model

uvicorn, Request = needed("uvicorn", "serve"), needed("starlette.requests", "serve").Request
HTMLResponse = needed("starlette.responses", "serve").HTMLResponse

from fastllm.serving.app import ServedModel, make_app  # noqa: E402
from fastllm.serving.connection import Connection  # noqa: E402

SHAPE = dict(context_length=64, num_layers=1, num_heads=2, hidden_size=16)
KINDS = {
    "generate": {}, "translate": {"encoder": "gru"},
    "classify": {"encoder": "transformer", "decoder": "none", "heads": ("classify",), "labels": ("bad", "good")},
    "answer": {"encoder": "transformer", "decoder": "none", "heads": ("span",), "segments": 2},
}  # fmt: skip


def served_models(folder):
    """A model of each task, by its name, with a tokenizer trained in ``folder``."""
    torch.manual_seed(0)
    tokenizer = dataset("classify", folder).tokenizer
    made = {}
    for task, kind in KINDS.items():
        model = build_model(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size, **kind)).eval()
        for p in model.requires_grad_(False).parameters():
            p.mul_(3)
        made[task] = ServedModel(model, tokenizer)
    return made


class Running:
    """The application on a free port, in a thread of its own."""

    def __init__(self, models, seconds=20.0, page=None, **options):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.sent = queue.Queue()
        inner = make_app(models, ("127.0.0.1", "LocalHost", "::1"), seconds)

        async def app(scope, receive, send):
            if page is not None and scope["path"] == "/drive":
                if scope["method"] == "POST":
                    self.sent.put(await Request(scope, receive).json())
                await HTMLResponse(page)(scope, receive, send)
            else:
                await inner(scope, receive, send)

        config = uvicorn.Config(app, http=Connection, log_level="error", ws="none", lifespan="off", **options)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()

    def post(self, task, values, headers=()):
        """(status, body)."""
        content = values if isinstance(values, bytes) else json.dumps(values).encode()
        request = urllib.request.Request(
            f"{self.url}/{task}", content, {"Content-Type": "application/json", **dict(headers)}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
