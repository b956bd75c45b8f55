"""Ctrl-C in the training of a tokenizer."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastllm.data import interruptible
from fastllm.data.interruptible import train_from_texts

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")


class Native:
    """A trainer that sees no signal and works until it is told to end."""

    def __init__(self):
        self.seen, self.reading, self.end, self.threads = [], threading.Event(), threading.Event(), set()

    def train_from_iterator(self, texts, trainer):
        for text in texts:
            self.threads.add(threading.current_thread())
            self.seen.append(text)
            self.reading.set()
        self.end.wait(60)


def interrupt(after):
    def send():
        assert after.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()


def test_the_texts_are_read_here_and_come_in_order(monkeypatch):
    monkeypatch.setattr(interruptible, "PORTION", 10)
    native, readers = Native(), set()
    native.end.set()

    def texts():
        for number in range(1000):
            readers.add(threading.current_thread())
            yield f"text {number}"

    train_from_texts(native, texts(), None)
    assert native.seen == [f"text {number}" for number in range(1000)]
    assert readers == {threading.current_thread()}


@POSIX
def test_ctrl_c_leaves_a_trainer_that_sees_no_signal():
    native = Native()
    interrupt(native.reading)
    with pytest.raises(KeyboardInterrupt):
        train_from_texts(native, ["one", "two"], None)
    assert not native.end.is_set()
    native.end.set()


@POSIX
def test_after_ctrl_c_no_further_text_is_trained_on(monkeypatch):
    monkeypatch.setattr(interruptible, "PORTION", 1)
    native = Native()
    interrupt(native.reading)

    def texts():
        yield "one"
        while True:
            time.sleep(0.01)
            yield "more"

    with pytest.raises(KeyboardInterrupt):
        train_from_texts(native, texts(), None)
    (worker,) = native.threads
    worker.join(60)
    assert not worker.is_alive()


@pytest.mark.parametrize("fails", ["texts", "trainer"])
def test_errors_come_back(fails, monkeypatch):
    monkeypatch.setattr(interruptible, "PORTION", 1)
    native = Native()
    native.end.set()

    def broken(texts, trainer):
        next(texts)
        raise ValueError("trainer")

    if fails == "trainer":
        native.train_from_iterator = broken

    def texts():
        for number in range(100):
            if fails == "texts" and number == 50:
                raise ValueError("texts")
            yield "text"

    with pytest.raises(ValueError, match=fails):
        train_from_texts(native, texts(), None)


@POSIX
def test_the_command_ends_while_it_merges(tmp_path):
    code = (
        "import sys, threading, os, signal; from fastllm.cli import main; from fastllm.data import interruptible;\n"
        "real = interruptible.train_from_texts\n"
        "class Endless:\n"
        "    def train_from_iterator(self, texts, trainer):\n"
        "        list(texts); os.kill(os.getpid(), signal.SIGINT); threading.Event().wait()\n"
        "from fastllm.data import tokenizer_training\n"
        "tokenizer_training.train_from_texts = lambda inner, texts, trainer: real(Endless(), texts, trainer)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "text.txt").write_text("some words of a text\n" * 50)
    command = [sys.executable, "-c", code, "tokenizer", "train", "text.txt", "--out", "out", "--vocab-size", "300"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (130, "fastllm tokenizer: error: interrupted\n")
    assert os.listdir(tmp_path) == ["text.txt"]
