"""How much a store may take."""

from dataclasses import dataclass

SOFT_SHARE = 0.9
"""Share of a limit from which on the store warns, and looks for garbage."""

RETRY_AFTER_S = 30.0
"""When a write that a limit refused may succeed, in seconds."""


@dataclass(frozen=True)
class StoreLimits:
    """How much a store may take. Writes beyond are RESOURCE_EXHAUSTED; reads go on.

    Attributes:
        max_row_bytes: Largest size of the file with the rows.
        max_blob_bytes: Most bytes of blobs, uploads under way included; None for no limit of its
            own.
        keep_free_bytes: Room that is left free on the disk.
    """

    max_row_bytes: int = 1 << 40
    max_blob_bytes: int | None = None
    keep_free_bytes: int = 64 << 20
