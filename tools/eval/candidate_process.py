"""Runs inside a sandbox: a program comes in, then calls of a function of it; what each call brings goes out.

Messages are plain data in both directions, through stdin and stdout as they are at the start; the program's own are
others. What is written here can be forged by the program, so the reader takes it for no more than answers.
"""

from __future__ import annotations

import collections.abc
import contextlib
import io
import os
import sys
import types
from itertools import islice
from typing import Any, BinaryIO

from reflectron.tools.eval.check_messages import JOB_FILE, JOB_LIMITS, LIMITS, MOST_ITEMS, Call, Program, first_not_data
from reflectron.tools.sandbox.plain_data import PlainDataError, decode, encode, read_message, write_message

_PRINTED_CHARACTERS = 1 << 20
_TEXT_CHARACTERS = 1000
_ARGUMENTS_BYTES = 1 << 16


def main() -> None:
    """Load the program, then answer calls until there are no more."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    with open(JOB_FILE, "rb") as file:
        program: Program = read_message(file, JOB_LIMITS)
    printed = _Printed()
    with contextlib.redirect_stdout(printed):
        try:
            function = _load(program)
        except BaseException as error:
            _write(answers, {"kind": "raised", **_raised(error)})
            return
        _write(answers, {"kind": "loaded"})
        while True:
            try:
                call: Call = read_message(calls, LIMITS)
            except EOFError:
                return
            _write(answers, _answer(function, call) | {"printed": printed.take()})


def _load(program: Program) -> Any:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(program["code"], "solution.py", "exec"), vars(module))
    if program["entry_point"] not in vars(module):
        raise NameError(f"name '{program['entry_point']}' is not defined")
    return vars(module)[program["entry_point"]]


def _answer(function: Any, call: Call) -> dict[str, Any]:
    arguments, named = call
    before = encode(call, LIMITS)
    try:
        value = function(*arguments, **named)
        answer = _described(value, [*arguments, *named.values()])
    except BaseException as error:
        answer = {"kind": "raised", **_raised(error)}
    try:
        if encode(call, LIMITS) != before:
            answer["arguments"] = call
    except PlainDataError as error:
        return {"kind": "unfit", "reason": str(error)}
    return answer


def _described(value: Any, arguments: list[Any]) -> dict[str, Any]:
    for number, argument in enumerate(arguments):
        if value is argument and isinstance(value, (list, dict, set, bytearray)):
            return {"kind": "argument", "number": number}
    if isinstance(value, collections.abc.Iterator):
        return _items(value)
    return {"kind": "value", "value": value}


def _items(iterator: collections.abc.Iterator[Any]) -> dict[str, Any]:
    items: list[Any] = []
    answer: dict[str, Any] = {"kind": "items", "items": items, "more": False, "then": None}
    try:
        items.extend(islice(iterator, MOST_ITEMS))
        answer["more"] = len(items) == MOST_ITEMS and next(iterator, answer) is not answer
    except BaseException as error:
        # `extend` keeps what came before the error.
        answer["then"] = _raised(error)
    return answer


def _raised(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: the names of its classes, nearest first, and what it was made of."""
    names = [kind.__name__ for kind in type.mro(type(error))]
    try:
        encoded = encode(tuple(error.args), LIMITS)
        if len(encoded) <= _ARGUMENTS_BYTES and first_not_data(arguments := decode(encoded, LIMITS)) is None:
            return {"classes": names, "arguments": arguments}
    except BaseException:
        # Whatever a program's own exception does when it is asked.
        pass
    try:
        return {"classes": names, "arguments": (str(error)[:_TEXT_CHARACTERS],)}
    except BaseException:
        return {"classes": names, "arguments": ()}


def _write(answers: BinaryIO, answer: dict[str, Any]) -> None:
    try:
        write_message(answers, answer, LIMITS)
    except PlainDataError as error:
        write_message(answers, {"kind": "unfit", "reason": str(error)}, LIMITS)


class _Printed(io.StringIO):
    """What a program prints, up to a limit."""

    def write(self, text: str) -> int:
        room = _PRINTED_CHARACTERS - self.tell()
        super().write(text[: max(room, 0)])
        return len(text)

    def take(self) -> str:
        """All that was printed since the last time."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text
