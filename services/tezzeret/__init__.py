"""Tezzeret: turns blueprints into kernels and proves that they compute what the blueprint says."""
