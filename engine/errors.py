"""An exception of somebody else's code as one line."""


def one_line(error: BaseException) -> str:
    """Type and first line of what it says."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
