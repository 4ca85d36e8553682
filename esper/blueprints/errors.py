class BlueprintError(ValueError):
    """A blueprint, kernel or set of weights breaks a rule.

    Attributes:
        field: Path of what is wrong, such as `graph.nodes[3].attributes.out`.
        value: The offending value as text.
        rule: The rule that it breaks, as a sentence without a full stop.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field = field
        self.value = str(value)
        self.rule = rule
        super().__init__(f"{field} is {self.value!r}: {rule}")
