"""What data preparation and loading raise: errors for a user, and documents that cannot be used."""


class DataError(ValueError):
    """Data or a data file that cannot be used; the message says what, where and what to do."""


class BadDocument(DataError):
    """A source document that cannot be used, with a `reason` that reports can count."""

    def __init__(self, origin: str, reason: str, detail: str) -> None:
        super().__init__(origin, reason, detail)
        self.origin = origin
        """`file:line`, or `file.tar:member`."""
        self.reason = reason
        """A short name in snake case, such as `missing_image`."""
        self.detail = detail
        self.excerpt: str | None = None
        """How the record begins, where it is text."""

    def __str__(self) -> str:
        return f"{self.origin}: {self.detail} [{self.reason}]"


class LeftOut(Exception):
    """A document that its source itself marks as one without content, with a `reason` that reports can count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnusableImage(DataError):
    """A picture that cannot be read or decoded, with a `reason` that reports can count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
