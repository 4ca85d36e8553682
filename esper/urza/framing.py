"""Blob chunks on the wire without the copies that a protobuf message makes of its bytes.

A serialized message followed by one more field is the message with that field. So what is small
of a chunk is left to protobuf, and its data is put behind it and found there again. Data that
stands elsewhere, as another writer of protobuf may put it, is left to protobuf too.
"""

from dataclasses import dataclass
from typing import TypeAlias

import grpc

from esper.urza.v1 import blob_pb2

Bytes: TypeAlias = bytes | memoryview
# Quoted: generic in the type stubs alone.
Upload: TypeAlias = "grpc.StreamUnaryMultiCallable[UploadChunk, blob_pb2.WriteBlobResponse]"
Download: TypeAlias = "grpc.UnaryStreamMultiCallable[blob_pb2.ReadBlobRequest, Bytes]"
AsyncUpload: TypeAlias = (
    "grpc.aio.StreamUnaryMultiCallable[UploadChunk, blob_pb2.WriteBlobResponse]"
)
AsyncDownload: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[blob_pb2.ReadBlobRequest, Bytes]"

WRITE = "/esper.urza.v1.BlobService/WriteBlob"
READ = "/esper.urza.v1.BlobService/ReadBlob"

_WRITE_DATA = blob_pb2.WriteBlobRequest.DATA_FIELD_NUMBER
_READ_DATA = blob_pb2.ReadBlobResponse.DATA_FIELD_NUMBER
_ASKED = blob_pb2.ReadBlobRequest.SerializeToString
_VARINT = 0
_LENGTH_PREFIXED = 2


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """A `WriteBlobRequest`: everything but `data`, and `data`."""

    head: blob_pb2.WriteBlobRequest
    data: Bytes


def encode_upload(chunk: UploadChunk) -> bytes:
    """Returns the bytes of a `WriteBlobRequest`."""
    return _joined(chunk.head.SerializeToString(), _WRITE_DATA, chunk.data)


def decode_upload(message: bytes) -> UploadChunk:
    """Returns what a serialized `WriteBlobRequest` says; its data is a view of `message`.

    Raises:
        DecodeError: Where it is none.
    """
    start, data = _split(message, _WRITE_DATA)
    if start is None:
        head = blob_pb2.WriteBlobRequest.FromString(message)
        return UploadChunk(head, head.data)
    return UploadChunk(blob_pb2.WriteBlobRequest.FromString(message[:start]), data)


def encode_download(data: bytes) -> bytes:
    """Returns the bytes of a `ReadBlobResponse`."""
    return _joined(b"", _READ_DATA, data)


def decode_download(message: bytes) -> Bytes:
    """Returns the data of a serialized `ReadBlobResponse`, where it can be as a view of `message`.

    Raises:
        DecodeError: Where it is none.
    """
    start, data = _split(message, _READ_DATA)
    # Anything before the data is no field of ours, but has to be well-formed all the same.
    return data if start == 0 else blob_pb2.ReadBlobResponse.FromString(message).data


def upload_call(channel: grpc.Channel) -> Upload:
    """Returns the call of `WriteBlob` that takes `UploadChunk`s."""
    return channel.stream_unary(WRITE, encode_upload, blob_pb2.WriteBlobResponse.FromString)


def download_call(channel: grpc.Channel) -> Download:
    """Returns the call of `ReadBlob` that gives the data of each response."""
    return channel.unary_stream(READ, _ASKED, decode_download)


def async_upload_call(channel: grpc.aio.Channel) -> AsyncUpload:
    """Returns `upload_call` of a channel for asyncio."""
    return channel.stream_unary(WRITE, encode_upload, blob_pb2.WriteBlobResponse.FromString)


def async_download_call(channel: grpc.aio.Channel) -> AsyncDownload:
    """Returns `download_call` of a channel for asyncio."""
    return channel.unary_stream(READ, _ASKED, decode_download)


def _joined(head: bytes, field: int, data: Bytes) -> bytes:
    if not data:
        return head
    return b"".join((head, _varint(field << 3 | _LENGTH_PREFIXED), _varint(len(data)), data))


def _split(message: bytes, field: int) -> tuple[int | None, memoryview]:
    """Returns where the field begins and its bytes, if it is the last of the message; else None."""
    view = memoryview(message)
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        value, position = _read_varint(message, position)
        if tag & 7 == _LENGTH_PREFIXED:
            end = position + value
            if tag >> 3 == field and end == len(message):
                return start, view[position:]
            position = end
        elif tag & 7 != _VARINT:
            break
    return None, view


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns a number and where it ends; beyond the end of the message where it is cut off."""
    number = 0
    shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
    return number, len(message) + 1
