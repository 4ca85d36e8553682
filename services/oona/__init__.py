"""Oona: the durable event log."""
