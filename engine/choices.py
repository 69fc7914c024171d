"""What stands at the end of a choice between the values of a ``Literal``."""

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """Mark what no value comes to: one that is added to the ``Literal`` and forgotten there is a type error.

    ``typing.assert_never``, which Python 3.10 does not have.

    Raises:
        AssertionError: when it is reached all the same.
    """
    raise AssertionError(f"{value!r} is not handled")
