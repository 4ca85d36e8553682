"""Rows of the grid: what was measured at one shape, a line of a file each."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

GROUPS = (
    "forward",
    "forward with telemetry",
    "forward and backward",
    "forward and backward with telemetry",
    "forward and backward, direct gradients",
)
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cell:
    """What one group shows at one shape.

    Attributes:
        ratios: Time of each alternative over ours.
        roofline: Share of the roofline that ours reaches.
        median_s: Median of ours.
    """

    ratios: Mapping[str, float]
    roofline: float
    median_s: float

    @property
    def best(self) -> str:
        """The alternative that took the least."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    @property
    def ratio(self) -> float:
        """Its time over ours."""
        return self.ratios[self.best]


@dataclass(frozen=True)
class Row:
    """What was measured at one shape.

    Attributes:
        shape: Tokens, width, seeds, rank.
        groups: What was timed, by name.
        megabytes: Peak of the temporaries of forward and backward, by name.
        peak_flops: Operations a second of one core, measured in the same process.
        peak_bytes: Bytes a second of one core, measured in the same process.
        made_by: Build and heap.
    """

    shape: Shape
    groups: Mapping[str, Cell]
    megabytes: Mapping[str, float]
    peak_flops: float
    peak_bytes: float
    made_by: str

    @property
    def name(self) -> str:
        """The shape in words."""
        return "N{}-D{}-S{}-r{}".format(*self.shape)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file, none if it is not there.

    A last line that a stopped run has left unfinished is no row.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    rows = []
    for line in lines:
        fields = json.loads(line)
        fields["shape"] = tuple(fields["shape"])
        fields["groups"] = {name: Cell(**cell) for name, cell in fields["groups"].items()}
        rows.append(Row(**fields))
    return rows


def append_row(path: Path, row: Row) -> None:
    """Writes a row behind the others, and returns when it is on the disk."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # an unfinished line gives way
        file.write(json.dumps(asdict(row)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
