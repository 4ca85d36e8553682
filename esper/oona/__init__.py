"""Client of Oona, the event log."""
