"""Etags of records: the revision, and a digest by which damage at rest is found."""

import hashlib

from esper.urza.v1 import library_pb2 as pb

_DIGEST_CHARS = 16


def etag_of(record: pb.BlueprintRecord | pb.KernelRecord) -> str:
    """Returns the etag that belongs to what a record holds besides."""
    content = type(record)()
    content.CopyFrom(record)  # type: ignore[arg-type]
    content.ClearField("etag")
    digest = hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
    return f"{record.revision:x}-{digest[:_DIGEST_CHARS]}"
