"""The one exception of the data room, apart from everything else so that every module can raise it."""


class DataError(ValueError):
    """A dataset, an image or an annotation that cannot be used.

    The message names the value that was found, what was expected, and what to do about it.
    """


def listing(values: list[str], limit: int = 10) -> str:
    """Join the first `limit` values for an error message and count the rest.

    Example: `listing(["a", "b", "c"], limit=2)` is `"a, b, and 1 more"`.
    """
    shown = ", ".join(values[:limit])
    hidden = len(values) - limit
    return f"{shown}, and {hidden} more" if hidden > 0 else shown
