"""An Urza that the tests of this folder share."""

import pytest
from urza_samples import new_kernel

from esper import blueprints
from esper.plane import Plane
from esper.urza.client import UrzaClient
from esper.urza.v1 import blob_pb2_grpc
from esper.urza.v1 import library_pb2 as pb
from esper.urza.v1 import library_pb2_grpc


@pytest.fixture
def urza(store_plane: Plane) -> UrzaClient:
    return store_plane.urza


@pytest.fixture
def library(store_plane: Plane) -> library_pb2_grpc.LibraryServiceStub:
    return library_pb2_grpc.LibraryServiceStub(store_plane.channel("urza"))


@pytest.fixture
def blobs(store_plane: Plane) -> blob_pb2_grpc.BlobServiceStub:
    return blob_pb2_grpc.BlobServiceStub(store_plane.channel("urza"))


@pytest.fixture
def kernel(urza: UrzaClient) -> pb.KernelRecord:
    """A stored kernel of a test's own."""
    urza.create_blueprint(blueprints.get("bottleneck"))
    return urza.create_kernel(new_kernel(), tags=["tag"])
