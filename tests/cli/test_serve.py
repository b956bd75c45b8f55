"""The web page's JSON interface and its limits."""

import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import tokenizers
from served import Running

from fastllm.data import Tokenizer
from fastllm.data.tokenizer import END_OF_TEXT
from fastllm.serving import app
from fastllm.serving.app import ANSWERS, MAX_BODY_BYTES, ServedModel, _written
from fastllm.serving.connection import Connection
from fastllm.tasks.answer import answers
from fastllm.tasks.classify import classify
from fastllm.tasks.translate import translate


@pytest.fixture(scope="module")
def served(models):
    running = Running(models)
    yield running
    running.close()


def test_every_task_answers(served):
    status, text = served.post("generate", {"prompt": "the cat", "max_new_tokens": 9, "seed": 3})
    assert status == 200
    assert served.post("generate", {"prompt": "the cat", "max_new_tokens": 9, "seed": 3}) == (200, text)
    status, reply = served.post("translate", {"text": "the cat\n\nthe dog", "beams": 2})
    assert status == 200
    assert json.loads(reply)["translation"].count("\n") == 2
    status, reply = served.post("classify", {"text": "the cat"})
    assert status == 200
    assert {entry["label"] for entry in json.loads(reply)["labels"]} == {"bad", "good"}
    text = "the key is 7. red cat"
    status, reply = served.post("answer", {"text": text, "question": "which?"})
    found = json.loads(reply)
    assert text[found["start"] : found["end"]] == found["answer"]


def test_the_likeliest_label_comes_first(models, served):
    entries = json.loads(served.post("classify", {"text": "the cat"})[1])["labels"]
    model = models["classify"]
    bad, good = classify(model.model, model.tokenizer, ["the cat"])[0].tolist()
    expected = sorted([(good, "good"), (bad, "bad")], reverse=True)
    assert [(entry["probability"], entry["label"]) for entry in entries] == expected


def test_a_text_without_an_answer_is_said_to_have_none(models, served):
    model, question = models["answer"], "which?"
    texts = [" ".join(words) for words in itertools.permutations(["the", "key", "is", "7."], 3)]
    spans = answers(model.model, model.tokenizer, [(question, text) for text in texts], allow_none=True)
    assert {bool(span.text) for span in spans} == {True, False}
    for text, span in zip(texts, spans, strict=True):
        found = json.loads(served.post("answer", {"text": text, "question": question})[1])
        assert found == {"answer": span.text, "start": span.start, "end": span.end}


def test_what_is_written_begins_with_its_space(models, monkeypatch):
    """The decoder of Llama 2 and T5 drops the space of a first word, which here follows the prompt."""
    pieces = [(piece, 0.0) for piece in (END_OF_TEXT, "\u2581", *"abc")]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens([END_OF_TEXT])
    tokenizer = Tokenizer(inner.to_str())
    asked, whole = tokenizer.encode("ab"), tokenizer.encode("ab ca")
    monkeypatch.setattr(app, "generate", lambda model, start, **options: iter(whole[len(start) - 1 :]))
    assert whole[: len(asked)] == asked
    written = _written(ServedModel(models["generate"].model, tokenizer), {"prompt": "ab"}, time.monotonic() + 60)
    assert "".join(written) == " ca"


def test_lines_to_translate_end_at_newlines_alone(models, served):
    text = "the cat\x85the dog\u2028red\r\n\r\nred cat"
    translation = json.loads(served.post("translate", {"text": text, "beams": 1})[1])["translation"]
    model = models["translate"]
    expected = translate(model.model, model.tokenizer, [text.split("\r\n")[0], "red cat"], beams=1)
    assert translation == f"{expected[0]}\n\n{expected[1]}"


def test_text_comes_piece_by_piece(served):
    request = urllib.request.Request(
        f"{served.url}/generate", json.dumps({"prompt": "the", "max_new_tokens": 60, "temperature": 1.5}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.headers["Transfer-Encoding"] == "chunked"
        assert reply.read1(1)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("translate", {"text": " "}, "text: expected a text"),
        ("translate", {"text": "x", "beams": 99}, "beams: expected at most 16, got 99"),
        ("translate", {"text": "x", "beams": 0}, "beams: expected at least 1"),
        ("translate", {"text": "x", "beams": True}, "beams: expected a number"),
        ("generate", {"prompt": 3}, "prompt: expected a text"),
        ("generate", {"max_new_tokens": 10**6}, "max_new_tokens: expected at most 1,000"),
        ("generate", {"temperature": -1}, "temperature must be at least 0"),
        ("classify", {"text": "x" * 30_000}, "text: expected at most 20,000 characters"),
        ("answer", {"text": "x"}, "question: expected a text"),
        ("classify", [1], "expected a JSON object"),
        ("classify", b"{", "expected JSON"),
        ("classify", {"text": "a \ud83d b"}, "text: half a surrogate pair (U+D83D at character 2)"),
        ("translate", {"text": "\udc00", "beams": 1}, "text: half a surrogate pair"),
        ("answer", {"text": "x", "question": "\ud800?"}, "question: half a surrogate pair"),
        ("generate", {"prompt": "\ud800"}, "prompt: half a surrogate pair"),
        ("classify", b'{"text": "x", "y": NaN}', "expected JSON"),
        ("generate", b'{"temperature": Infinity}', "expected JSON"),
        ("generate", b'{"max_new_tokens": 1e999}', "max_new_tokens: expected a number"),
        ("generate", b'{"temperature": -1e999}', "temperature: expected a number"),
        ("generate", b'{"top_p": ' + b"9" * 400 + b"}", "top_p: expected a number"),
        ("generate", {"seed": -1}, "seed must be at least 0"),
        ("generate", {"seed": 1e30}, "seed must be at least 0"),
        ("translate", b'{"text": "x", "beams": 1e999}', "beams: expected a number"),
        ("classify", b"x" * (MAX_BODY_BYTES + 1), f"expected at most {MAX_BODY_BYTES:,} bytes"),
    ],
)
def test_what_cannot_be_served_is_said(served, task, values, message):
    status, reply = served.post(task, values)
    assert status == 400
    assert message in json.loads(reply)["error"]


def test_other_sites_and_unknown_tasks_are_refused(served, models):
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "[::2]:80", ""):
        assert served.post("classify", {"text": "x"}, {"Host": host})[0] == 421
    for host in ("LocalHost", "LOCALHOST:80", "127.0.0.1", "[::1]", "[::1]:80"):
        assert served.post("classify", {"text": "x"}, {"Host": host})[0] == 200
    for kind in ("text/plain", "application/jsonl", ""):
        assert served.post("classify", {"text": "x"}, {"Content-Type": kind})[0] == 400
    for kind in ("Application/JSON", "application/json;charset=utf-8"):
        assert served.post("classify", {"text": "x"}, {"Content-Type": kind})[0] == 200
    assert served.post("paint", {"text": "x"})[0] == 404


def test_a_browser_that_leaves_in_the_middle_of_a_request_is_no_error(served, caplog):
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        time.sleep(0.2)
    assert served.post("classify", {"text": "x"})[0] == 200
    assert "ClientDisconnect" not in caplog.text


def test_a_request_that_takes_too_long_ends(models):
    running = Running(models, seconds=1e-6)
    try:
        status, reply = running.post("translate", {"text": "the cat sees the dog " * 20, "beams": 16})
        assert status == 503
        assert "took more than" in reply
    finally:
        running.close()
    # What is written ends where it is.
    assert list(_written(models["generate"], {"prompt": "x"}, time.monotonic() - 1)) == []


def test_what_took_too_long_is_waited_for_by_the_next(models, monkeypatch):
    going, most, release = [], [], threading.Event()

    def slow(served, values, deadline):
        going.append(values)
        most.append(len(going))
        release.wait(300)
        going.pop()
        return values

    sites, site = [], app._Site
    monkeypatch.setattr(app, "_Site", lambda *args: sites.append(site(*args)) or sites[0])
    monkeypatch.setitem(app.ANSWERS, "classify", slow)
    running = Running(models, seconds=0.3)
    try:
        for _ in range(3):
            assert running.post("classify", {"text": "x"})[0] == 503
        # Text too: nothing was written, which must not look like an empty text.
        status, reply = running.post("generate", {"prompt": "x"})
        assert (status, most) == (503, [1])
        assert "took more than" in reply
        sites[0].seconds = 60.0
        release.set()
        while going:
            time.sleep(0.01)
        assert running.post("generate", {"prompt": "x", "max_new_tokens": 1})[0] == 200
        assert running.post("classify", {"text": "x"})[0] == 200
        assert most == [1, 1]
    finally:
        release.set()
        running.close()


@pytest.mark.parametrize(
    ("task", "values"),
    [("translate", {"text": "the cat\n" * 2000}), ("answer", {"text": "the cat " * 2000, "question": "which?"})],
)
def test_what_is_computed_in_parts_ends_at_the_deadline(models, task, values):
    parts = []
    model = models[task].model
    encode, model.encode = model.encode, lambda *args: parts.append(1) or encode(*args)
    try:
        with pytest.raises(TimeoutError):
            ANSWERS[task](models[task], values, time.monotonic() - 1)
    finally:
        del model.encode
    assert len(parts) == 1


def test_connections_that_ask_for_nothing_keep_nobody_out(models, monkeypatch):
    refused, look = threading.Event(), Connection._look
    monkeypatch.setattr(
        Connection, "_look", lambda self, seen: look(self, seen) if refused.is_set() else self._look_again(seen)
    )
    running = Running(models, timeout_keep_alive=1, limit_concurrency=8)
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    heads = [b"", b"GET / HTTP/1.1\r\nHost: local"] * 4
    silent = [socket.create_connection(address) for _ in heads]
    try:
        for connection, head in zip(silent, heads, strict=True):
            connection.sendall(head)
        assert running.post("classify", {"text": "x"})[0] == 503
        refused.set()
        for connection in silent:
            connection.settimeout(30)
            assert connection.recv(1) == b""
        assert running.post("classify", {"text": "x"})[0] == 200
        # The next head on a connection that has had an answer.
        with socket.create_connection(address) as connection:
            connection.settimeout(30)
            connection.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /mod")
            while connection.recv(4096):
                pass
    finally:
        for connection in silent:
            connection.close()
        running.close()


def test_a_connection_outlives_an_answer_that_takes_long(models, monkeypatch):
    monkeypatch.setitem(app.ANSWERS, "classify", lambda *args: time.sleep(2.5) or {"labels": []})
    running = Running(models, timeout_keep_alive=1)
    try:
        assert running.post("classify", {"text": "x"}) == (200, '{"labels":[]}')
    finally:
        running.close()


def test_a_connection_is_kept_for_a_whole_period_after_an_answer():
    connection, looks, closed = object.__new__(Connection), [], []
    connection.timeout_keep_alive = 5
    connection.loop = SimpleNamespace(call_later=lambda seconds, look, seen: looks.append(seen))
    connection.transport = SimpleNamespace(close=lambda: closed.append(True))
    connection.cycle = SimpleNamespace(response_complete=False)
    connection._look(connection.cycle)
    connection.cycle.response_complete = True  # just before the next look
    connection._look(looks.pop())
    assert not closed
    connection._look(looks.pop())
    assert closed
