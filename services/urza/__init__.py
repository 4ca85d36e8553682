"""Urza: the library of blobs, blueprints and kernels."""
