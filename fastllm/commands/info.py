"""Versions, hardware, and which backend serves each op here and why."""

from __future__ import annotations

import argparse

import fastllm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    print(fastllm.info())
    return 0
