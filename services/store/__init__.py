"""The storage engine that Urza and Oona share."""
