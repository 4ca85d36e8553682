"""`python -m esper.services.oona.offline check DIR`: checks a log that is not served.

Holds the lock of the store meanwhile. Writes the messages of `CheckLog` to stdout, one JSON object
a line.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from esper.services.oona.check import Checker
from esper.services.oona.contents import FOLDER
from esper.services.oona.contents import SCHEMA
from esper.services.serving.context import StartupError
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import data_file


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 when done, 1 with one line on stderr else."""
    parser = argparse.ArgumentParser(prog="esper.services.oona.offline", description=__doc__)
    parser.add_argument("operation", choices=["check"])
    parser.add_argument("data", type=Path, help="data directory of the server")
    parser.add_argument("--quarantine", action="store_true")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    directory = options.data.absolute() / FOLDER
    try:
        if not data_file(directory).exists():
            raise StartupError(f"{options.data} holds no log of Oona")
        store = Store(directory, SCHEMA)
        try:
            for step in Checker(store, quarantine=options.quarantine):
                print(json.dumps(MessageToDict(step)), flush=True)
        finally:
            store.close()
    except (StartupError, OSError) as error:
        print(f"esper: {error}", file=sys.stderr)
        return 1
    except ServiceError as error:
        print(f"esper: {error.code.name}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
