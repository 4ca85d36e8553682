"""Messages that every contract shares; the generated code is in `esper.common.v1`."""
