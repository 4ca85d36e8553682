"""Execution layer: seed routing, blending and telemetry over the native core."""
