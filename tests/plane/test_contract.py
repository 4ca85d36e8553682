import hashlib
import subprocess
import sys
from pathlib import Path

from esper.plane.contract import FILES
from esper.plane.contract import contract_digest

PROTO = Path(__file__).resolve().parents[2] / "proto"


def test_every_proto_file_is_part_of_the_contract() -> None:
    names = {path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto")}
    assert {file.name for file in FILES} == names


def test_the_digest_is_that_of_names_and_descriptors() -> None:
    total = hashlib.sha256()
    for name, content in sorted((file.name, file.serialized_pb) for file in FILES):
        total.update(name.encode() + b"\0" + str(len(content)).encode() + b"\0" + content)
    assert contract_digest() == total.hexdigest()


def test_another_process_computes_the_same_digest() -> None:
    script = "from esper.plane.contract import contract_digest; print(contract_digest())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == contract_digest()
