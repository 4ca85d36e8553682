from pathlib import Path

import pytest

from esper.plane.address import default_address
from esper.plane.address import default_data_dir
from esper.plane.address import parse_address


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("unix:/tmp/a.sock", "unix:/tmp/a.sock"),
        ("unix:///tmp/a.sock", "unix:/tmp/a.sock"),
        ("unix:/tmp/b/../a.sock", "unix:/tmp/a.sock"),
        ("localhost:0", "localhost:0"),
        ("127.0.0.1:65535", "127.0.0.1:65535"),
        ("[::1]:50051", "[::1]:50051"),
        ("plane.example.org:1", "plane.example.org:1"),
    ],
)
def test_addresses_are_read_and_written(text: str, written: str) -> None:
    assert str(parse_address(text)) == written
    assert parse_address(written) == parse_address(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "unix:PATH or HOST:PORT"),
        ("nowhere", "unix:PATH or HOST:PORT"),
        (":50051", "unix:PATH or HOST:PORT"),
        ("::1:50051", "unix:PATH or HOST:PORT"),
        ("http://localhost:1", "unix:PATH or HOST:PORT"),
        ("local host:1", "unix:PATH or HOST:PORT"),
        ("localhost:", "port"),
        ("localhost:-1", "port"),
        ("localhost:65536", "port"),
        ("localhost:\N{SUPERSCRIPT TWO}", "port"),
        ("unix:", "names no socket file"),
        ("unix:/tmp/", "names no socket file"),
        (f"unix:/tmp/{'a' * 110}", "at most 107 bytes"),
    ],
)
def test_bad_addresses_are_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("unix:/tmp/a.sock", True),
        ("localhost:1", True),
        ("127.0.0.9:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("plane.example.org:1", False),
    ],
)
def test_local_means_out_of_reach_of_other_machines(text: str, local: bool) -> None:
    assert parse_address(text).is_local is local


def test_defaults_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_PLANE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("XDG_DATA_HOME", "/home/a/data")
    assert default_address().startswith("unix:/run/user/7/esper-")
    assert default_data_dir() == Path("/home/a/data/esper")
    monkeypatch.setenv("ESPER_PLANE", "localhost:5")
    assert default_address() == "localhost:5"
