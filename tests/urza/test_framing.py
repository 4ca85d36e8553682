"""Blob chunks on the wire: to the byte and to the field what protobuf makes of them."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from esper.common.v1 import digest_pb2
from esper.urza.framing import UploadChunk
from esper.urza.framing import decode_download
from esper.urza.framing import decode_upload
from esper.urza.framing import encode_download
from esper.urza.framing import encode_upload
from esper.urza.v1 import blob_pb2

DATA = st.one_of(
    st.binary(max_size=300), st.sampled_from([127, 128, 16383, 16384, 1 << 20]).map(bytes)
)
DIGESTS = st.none() | st.builds(
    digest_pb2.Digest, hash=st.text(max_size=70), size_bytes=st.integers(0, 1 << 40)
)
HEADS = st.builds(blob_pb2.WriteBlobRequest, digest=DIGESTS, write_offset=st.integers(0, 1 << 62))
UNKNOWN = st.sampled_from([b"", b"\x28\x05", b"\x22\x03abc", b"\x2d\x01\x02\x03\x04"])
"""Fields that a later version of the contract may add: a number, bytes, four bytes."""


@given(HEADS, DATA)
def test_an_upload_is_what_protobuf_writes(head: blob_pb2.WriteBlobRequest, data: bytes) -> None:
    whole = blob_pb2.WriteBlobRequest()
    whole.CopyFrom(head)
    whole.data = data
    assert encode_upload(UploadChunk(head, memoryview(data))) == whole.SerializeToString()


@given(HEADS, DATA, UNKNOWN, st.booleans())
def test_an_upload_is_read_as_protobuf_reads_it(
    head: blob_pb2.WriteBlobRequest, data: bytes, unknown: bytes, data_first: bool
) -> None:
    parts = [head.SerializeToString(), blob_pb2.WriteBlobRequest(data=data).SerializeToString()]
    message = b"".join([*(reversed(parts) if data_first else parts), unknown])
    expected = blob_pb2.WriteBlobRequest.FromString(message)
    found = decode_upload(message)
    assert bytes(found.data) == expected.data
    assert found.head.digest == expected.digest
    assert found.head.HasField("digest") == expected.HasField("digest")
    assert found.head.write_offset == expected.write_offset


@given(DATA, UNKNOWN, UNKNOWN)
def test_a_download_is_what_protobuf_writes_and_reads(
    data: bytes, before: bytes, after: bytes
) -> None:
    message = encode_download(data)
    assert message == blob_pb2.ReadBlobResponse(data=data).SerializeToString()
    assert bytes(decode_download(before + message + after)) == data


@given(st.binary(max_size=40))
def test_what_is_no_message_is_refused_as_protobuf_refuses_it(message: bytes) -> None:
    try:
        expected = blob_pb2.WriteBlobRequest.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode_upload(message)
    else:
        assert bytes(decode_upload(message).data) == expected.data


@pytest.mark.parametrize("message", [b"\x1a\x05abc", b"\x1a", b"\x0a\x01", b"\x1a\xff\xff\xff"])
def test_chunks_that_are_cut_off_are_refused(message: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_upload(message)
    with pytest.raises(DecodeError):
        decode_download(message.replace(b"\x1a", b"\x0a"))


def test_the_data_is_a_view_of_the_message() -> None:
    message = encode_download(bytes(1 << 20))
    data = decode_download(message)
    assert isinstance(data, memoryview)
    assert data.obj is message
