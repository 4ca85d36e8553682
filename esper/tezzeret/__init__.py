"""Client side of Tezzeret, the compiler of blueprints."""
