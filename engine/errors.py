"""An exception of somebody else's code as one line."""


def one_line(error: BaseException) -> str:
    """Type and first line of what it says, and the last where the first is but a place: so Triton's compiler speaks."""
    lines = str(error).strip().splitlines() or [""]
    said = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {said}"
