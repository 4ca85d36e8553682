"""Client of Urza, the library."""
