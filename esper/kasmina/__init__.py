"""Execution layer: seed routing, blending and telemetry over the native core."""

from esper.kasmina.layer import KasminaLayer
from esper.kasmina.lifecycle import SeedLifecycleState
from esper.kasmina.lifecycle import Transition
from esper.kasmina.model import MorphableModel
from esper.kasmina.sites import Bridge
from esper.kasmina.sites import SlotState
from esper.kasmina.wrapping import unwrap
from esper.kasmina.wrapping import wrap

__all__ = [
    "Bridge",
    "KasminaLayer",
    "MorphableModel",
    "SeedLifecycleState",
    "SlotState",
    "Transition",
    "unwrap",
    "wrap",
]
