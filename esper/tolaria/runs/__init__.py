"""Whole training runs from a configuration file: folder, logs, report."""
