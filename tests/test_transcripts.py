"""The calls of docs/grpc.md give the answers that stand there, on a fresh plane, in that order."""

import json
import re
import selectors
import subprocess
import sys
import time
from pathlib import Path

from esper.oona.v1 import event_pb2
from esper.urza.v1 import blob_pb2
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2
from esper.urza.v1 import store_pb2

PAGE = Path(__file__).parents[1] / "docs" / "grpc.md"
ANY = "*"
"""Stands in the page for what differs from run to run: times, etags, hashes of times."""
QUIET_S = 20.0


def transcripts() -> list[tuple[str, str, list[object]]]:
    """Returns method, request and answers of every call of the page."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        match = re.fullmatch(r"\$ call (\S+)(?: \\\n +| )'(.*?)'\n(.*)", block, re.S)
        assert match, block
        method, request, said = match.groups()
        found.append((method, request, documents(said)))
    return found


def documents(text: str) -> list[object]:
    """Returns the JSON documents that stand one after the other, as far as they are whole."""
    decoder = json.JSONDecoder()
    found = []
    text = text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            break
        found.append(value)
        text = text[end:].lstrip()
    return found


def same(shown: object, real: object) -> bool:
    """Returns whether an answer is the one shown."""
    if shown == ANY:
        return True
    if isinstance(shown, dict) and isinstance(real, dict):
        return shown.keys() == real.keys() and all(same(shown[key], real[key]) for key in shown)
    if isinstance(shown, list) and isinstance(real, list):
        return len(shown) == len(real) and all(map(same, shown, real))
    return shown == real


def ask(address: str, method: str, request: str, answers: int) -> list[object]:
    """Makes a call, waits for so many answers, and ends it where it does not end by itself."""
    buf = Path(sys.executable).with_name("buf")
    command = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", request]
    with subprocess.Popen(
        [*command, f"http://{address}/{method}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        said = b""
        deadline_s = time.monotonic() + QUIET_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(documents(said.decode())) < answers:
                assert selector.select(deadline_s - time.monotonic()), f"{method} said {said!r}"
                piece = process.stdout.read1()
                if not piece:
                    break
                said += piece
        process.kill()
    found = documents(said.decode())
    assert found or not answers, f"{method} {request}: {said.decode()}"
    return found[:answers]  # more may have come of a stream that has no end


def test_every_call_gives_the_answer_shown(start_server) -> None:
    server = start_server("urza", "oona", listen="127.0.0.1:0")
    for method, request, shown in transcripts():
        real = ask(server.address, method, request, len(shown))
        assert same(shown, real), f"{method} {request} answered {json.dumps(real, indent=2)}"


def test_every_method_of_urza_and_oona_is_shown() -> None:
    declared = {
        f"{service.full_name}/{method.name}"
        for file in (blob_pb2, library_pb2, run_pb2, store_pb2, event_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert {method for method, _, _ in transcripts()} == declared
