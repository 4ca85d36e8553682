"""The services of the plane; installed as `esper.services`."""
