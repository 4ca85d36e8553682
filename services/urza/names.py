"""Digests and resource names: `blueprints/{digest}`, `kernels/{digest}`, `runs/{id}`."""

import hashlib
import re

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import FieldViolation
from esper.services.serving.errors import require

HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
HASH_RULE = "must be a SHA-256 as 64 lower-case hexadecimal characters"
RUN_ID = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
RUN_ID_RULE = "1 to 64 of a-z, 0-9 and hyphen"
_RUNS = "runs/"
EMPTY_HASH = hashlib.sha256(b"").hexdigest()
MAX_BLOB_BYTES = 16 << 30


def check_hash(field: str, value: str) -> list[FieldViolation]:
    """Checks the form of a hash."""
    return [] if HASH.fullmatch(value) else [FieldViolation(field, value, HASH_RULE)]


def check_digest(field: str, digest: digest_pb2.Digest) -> list[FieldViolation]:
    """Checks the form of a digest, and that size and hash agree about the empty blob."""
    found = check_hash(f"{field}.hash", digest.hash)
    size_bytes = digest.size_bytes
    if not 0 <= size_bytes <= MAX_BLOB_BYTES:
        found.append(
            FieldViolation(f"{field}.size_bytes", size_bytes, f"must be 0 to {MAX_BLOB_BYTES}")
        )
    elif not found and (size_bytes == 0) != (digest.hash == EMPTY_HASH):
        rule = "must be 0 for the hash of the empty blob and for no other"
        found.append(FieldViolation(f"{field}.size_bytes", size_bytes, rule))
    return found


def check_name(field: str, name: str, collection: str) -> list[FieldViolation]:
    """Checks the form of a resource name."""
    if name.startswith(f"{collection}/") and HASH.fullmatch(name, len(collection) + 1):
        return []
    return [FieldViolation(field, name, f"must be {collection}/ followed by 64 of 0-9 and a-f")]


def check_record_name(field: str, name: str) -> list[FieldViolation]:
    """Checks the form of the name of a blueprint or a kernel."""
    collection = name.partition("/")[0]
    if collection in ("blueprints", "kernels") and not check_name(field, name, collection):
        return []
    rule = "must be blueprints/ or kernels/ followed by 64 of 0-9 and a-f"
    return [FieldViolation(field, name, rule)]


def key_of(field: str, name: str, collection: str) -> bytes:
    """Returns the 32 bytes that a resource is stored under.

    Raises:
        ServiceError: INVALID_ARGUMENT where the name has another form.
    """
    require(check_name(field, name, collection))
    return bytes.fromhex(name[len(collection) + 1 :])


def check_run_id(field: str, run_id: str) -> list[FieldViolation]:
    """Checks the form of a run's id."""
    return (
        []
        if RUN_ID.fullmatch(run_id)
        else [FieldViolation(field, run_id, f"must be {RUN_ID_RULE}")]
    )


def check_run_name(field: str, name: str) -> list[FieldViolation]:
    """Checks the form of a run's name."""
    if name.startswith(_RUNS) and RUN_ID.fullmatch(name, len(_RUNS)):
        return []
    return [FieldViolation(field, name, f"must be {_RUNS} followed by {RUN_ID_RULE}")]


def run_id_of(field: str, name: str) -> str:
    """Returns the id in a run's name.

    Raises:
        ServiceError: INVALID_ARGUMENT where the name has another form.
    """
    require(check_run_name(field, name))
    return name[len(_RUNS) :]
