"""What one Oona stores, and where."""

from esper.services.oona import log
from esper.services.oona import migrations
from esper.services.store.opening import Schema

SCHEMA = Schema(log.TABLES, version=3, migrations={1: migrations.from_1, 2: migrations.from_2})
FOLDER = "oona"
"""Folder of Oona's store in the data directory of a server."""
