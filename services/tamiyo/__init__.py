"""Tamiyo: decides where, when and what to grow."""
