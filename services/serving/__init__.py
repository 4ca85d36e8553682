"""The shell that every service of the plane runs in."""
