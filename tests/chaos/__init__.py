"""Kills a server under load, again and again, and compares what it holds with what it promised."""
