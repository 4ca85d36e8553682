"""Client side of Tamiyo, the strategic controller."""
