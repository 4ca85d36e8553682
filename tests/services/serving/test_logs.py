"""Log lines on a real pipe: one by one, and several at once."""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

from esper.services.serving import logs

LOG = logging.getLogger("esper.test")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """A pipe whose start the log takes for stderr; its end is read without waiting."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    end, start = os.pipe()
    os.set_blocking(end, False)
    with open(start, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.configure(as_json=True)
        yield end, stderr
        root.handlers[:] = kept
        root.setLevel(level)
    os.close(end)


@pytest.fixture
def written(pipe: tuple[int, TextIO]) -> int:
    return pipe[0]


def read(end: int) -> list[str]:
    try:
        return [json.loads(line)["message"] for line in os.read(end, 1 << 20).splitlines()]
    except BlockingIOError:
        return []


def test_a_line_is_written_as_it_comes(written: int) -> None:
    for text in ("first", "second"):
        LOG.info(text)
        assert read(written) == [text]


def test_gathered_lines_are_written_at_the_end_in_order(written: int) -> None:
    with logs.gathered():
        LOG.info("first")
        other = threading.Thread(target=LOG.info, args=("second",))
        other.start()
        other.join()
        LOG.info("third")
        assert read(written) == []
    assert read(written) == ["first", "second", "third"]
    LOG.info("fourth")
    assert read(written) == ["fourth"]


def test_no_line_of_another_thread_is_lost(written: int) -> None:
    texts = [str(number) for number in range(300)]

    def log() -> None:
        for text in texts:
            LOG.info(text)

    other = threading.Thread(target=log)
    other.start()
    while other.is_alive():
        with logs.gathered():
            pass
    other.join()
    assert read(written) == texts


def test_lines_come_out_when_the_work_fails(written: int) -> None:
    with pytest.raises(ZeroDivisionError), logs.gathered():
        LOG.info("before")
        raise ZeroDivisionError
    assert read(written) == ["before"]


def test_a_closed_stderr_does_not_end_the_work(pipe: tuple[int, TextIO]) -> None:
    end, stderr = pipe
    with logs.gathered():
        LOG.info("lost")
        stderr.close()
    assert read(end) == []
