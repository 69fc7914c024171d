"""One problem comes in, a verified reflection sample or the reason why there is none goes out.

Nothing here is remembered: answers and executions come from their journals where they hold them, so that the same
problem walked through again gives the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from reflectron.engine.data.conversation import BadRecord, Block
from reflectron.engine.data.records import parse_record
from reflectron.tools.data.corpus import require_unicode
from reflectron.tools.data.reflection.dialogue import Dialogue, Problem, Unusable
from reflectron.tools.data.reflection.executions import Interpreters, Session
from reflectron.tools.data.reflection.leftovers import leftover
from reflectron.tools.data.reflection.program import extract_tests, has_tests, parses, python_fences
from reflectron.tools.data.reflection.verification import Runner, Verdict, verify
from reflectron.tools.llm.client import Answer, LlmClient, RequestFailed
from reflectron.tools.llm.reply import FINAL
from reflectron.tools.llm.request import Request

_MOST_BLOCKS_A_ROUND = 4
"""Of a generator that writes block by block: prose that never comes to code ends here."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How far to go with a problem."""

    rounds: int = 4
    """Most programs run before the problem is given up."""
    answers: int = 2
    """Most one-off answers drawn before the problem is given up."""
    mutants: int = 8
    """Most changed answers that the tests are tried on."""

    def __post_init__(self) -> None:
        for name in ("rounds", "answers", "mutants"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")


@dataclass
class Outcome:
    """What became of a problem."""

    reason: str | None = None
    """Why it was rejected, ``<kind>: <detail>``; None when it was accepted."""
    final: bool = True
    """Whether trying again later would end the same way; the server's failures would not."""
    rounds: int = 0
    """Programs run."""
    failures: int = 0
    """Programs that failed."""
    answers: int = 0
    """One-off answers drawn."""
    answer_faults: list[str] = field(default_factory=list)
    """What was wrong with those thrown away."""
    mutants_tried: int = 0
    killed_by: str | None = None
    sample: dict[str, Any] | None = None
    """The training sample in the published schema."""


class Rejected(Exception):
    """The problem gives no sample: ``<kind>: <detail>``."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


class Reflection:
    """Both stages and the verification, for one problem after the other or many at a time."""

    def __init__(
        self, client: LlmClient, interpreters: Interpreters, dialogue: Dialogue, runner: Runner, settings: Settings
    ) -> None:
        self.client, self.interpreters, self.dialogue = client, interpreters, dialogue
        self.runner, self.settings = runner, settings

    async def solve(self, problem: Problem) -> Outcome:
        """Take a problem through both stages.

        Raises:
            Stopped: when the run is to end and the next answer is not in the journal.
        """
        outcome = Outcome()
        try:
            blocks = await self._reflect(problem, outcome)
            outcome.sample = await self._answer(problem, blocks, outcome)
        except Rejected as rejected:
            outcome.reason, outcome.final = str(rejected), rejected.final
        return outcome

    async def _reflect(self, problem: Problem, outcome: Outcome) -> list[Block]:
        """Stage 1: blocks as they happened, the last of them the output of a program whose tests passed."""
        blocks: list[Block] = []
        async with Session(self.interpreters, problem.key) as session:
            while outcome.rounds < self.settings.rounds:
                code = await self._attempt(problem, blocks)
                executed = await session.execute(code)
                blocks.append(Block("execution", executed.output))
                outcome.rounds += 1
                outcome.failures += executed.status != "ok"
                if executed.status == "ok" and has_tests(code):
                    return blocks
        last = "the last has no tests" if executed.status == "ok" else f"the last ended with {executed.status}"
        raise Rejected(f"tests never passed: {outcome.rounds} programs run, {last}")

    async def _attempt(self, problem: Problem, blocks: list[Block]) -> str:
        """Append prose and code; the code."""
        for _ in range(_MOST_BLOCKS_A_ROUND):
            answer = await self._ask(self.dialogue.reflect(problem, blocks))
            try:
                step = self.dialogue.step(answer.text)
            except Unusable as error:
                raise Rejected(str(error)) from None
            if not step:
                raise Rejected("no code: the turn ended before its tests passed")
            blocks += step
            if step[-1].type == "code":
                return step[-1].content
        raise Rejected(f"no code: {_MOST_BLOCKS_A_ROUND} blocks of prose in a row")

    async def _answer(self, problem: Problem, blocks: list[Block], outcome: Outcome) -> dict[str, Any]:
        """Stage 2: the sample with a one-off answer that holds."""
        for number in range(self.settings.answers):
            outcome.answers += 1
            try:
                said = await self._say(problem, blocks, number)
                sample = _sample(problem, blocks, said)
                verdict = await self._verify(problem, blocks, said)
            except Rejected as rejected:
                if not rejected.final:
                    raise
                outcome.answer_faults.append(str(rejected))
                continue
            outcome.mutants_tried, outcome.killed_by = verdict.mutants_tried, verdict.killed_by
            if verdict.reason is None:
                return sample
            outcome.answer_faults.append(verdict.reason)
        raise Rejected(outcome.answer_faults[-1])

    async def _say(self, problem: Problem, blocks: list[Block], number: int) -> list[Block]:
        said: list[Block] = []
        while len(said) < _MOST_BLOCKS_A_ROUND:
            answer = await self._ask(self.dialogue.answer(problem, blocks, said, number))
            try:
                part = self.dialogue.part(answer.text)
            except Unusable as error:
                raise Rejected(str(error)) from None
            said += part
            if not part or self.dialogue.one_part:
                break
        return said

    async def _verify(self, problem: Problem, blocks: list[Block], said: list[Block]) -> Verdict:
        code = _code(said)
        if not code:
            raise Rejected("no final code: the answer has no block of Python")
        if not parses(code):
            raise Rejected("syntax error: Python does not accept the final code")
        phrase = leftover("\n".join(block.content for block in said), problem.text)
        if phrase is not None:
            raise Rejected(f"leftover: the answer says {phrase!r}")
        tests = extract_tests(code, [block.content for block in blocks if block.type == "code"])
        return await self.interpreters.verify(lambda: verify(code, tests, self.settings.mutants, self.runner))

    async def _ask(self, request: Request) -> Answer:
        try:
            answer = await self.client.ask(request)
        except RequestFailed as failure:
            raise Rejected(f"request failed: {failure}", final=failure.kind in FINAL) from None
        if answer.outcome != "ok":
            raise Rejected(f"{answer.outcome}: the answer to a request of stage {request.stage} ended before its end")
        try:
            require_unicode(answer.text, f"the answer to a request of stage {request.stage}")
        except BadRecord as error:
            raise Rejected(str(error)) from None
        return answer


def _code(said: Sequence[Block]) -> str:
    codes = []
    for block in said:
        codes += [block.content] if block.type == "code" else [fence.code for fence in python_fences(block.content)]
    return "\n\n".join(codes).strip()


def _sample(problem: Problem, blocks: Sequence[Block], said: Sequence[Block]) -> dict[str, Any]:
    """The four turns of the published schema, checked as training checks them."""
    turns = (
        ("user", [Block("text", problem.instruction())]),
        ("assistant", blocks),
        ("user", [Block("text", problem.text)]),
        ("assistant", said),
    )
    messages = [{"role": role, "content": [asdict(block) for block in content]} for role, content in turns]
    sample = {"messages": messages, "type": "reflection"}
    try:
        parse_record(sample)
    except BadRecord as error:
        raise Rejected(str(error)) from None
    return sample
