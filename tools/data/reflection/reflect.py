"""Make verified reflection samples of problems.

A generator behind an endpoint writes code with tests, an interpreter in a sandbox runs it, the generator repairs it
until the tests pass, and answers once more as if at the first attempt. Answers and executions come from their journals
where they hold them, so that a run that is started again resumes wherever it ended, and the same problem gives the same
sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import assert_never

from reflectron.engine.data.conversation import BadRecord, Block
from reflectron.engine.data.conversation import checked_text as storable_text
from reflectron.engine.data.sources import parse_record
from reflectron.engine.files import write_text
from reflectron.tools.data.reflection.dialogue import Chat, GeneratorDialogue, ReflectionProblem, Tags, UnusableStep
from reflectron.tools.data.reflection.execution import (
    EXECUTIONS,
    AnswerVerdict,
    Interpreters,
    Runner,
    Session,
    sandbox_runner,
    verify,
)
from reflectron.tools.data.reflection.programs import extract_tests, has_tests, leftover, parses, python_fences
from reflectron.tools.data.reflection.results import (
    OUTCOMES,
    REJECTS,
    SAMPLES,
    OutcomeTally,
    ProblemOutcome,
    Reject,
    Results,
    lines,
)
from reflectron.tools.llm.arguments import ProblemProgress
from reflectron.tools.llm.client import LlmClient, ModelAnswer, RequestFailed
from reflectron.tools.llm.request import Request, content_hash
from reflectron.tools.llm.work import ATTEMPTS, ending, for_each
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

STATS = "stats.json"
_MOST_BLOCKS_A_ROUND = 4
"""A generator that writes block by block ends here when its prose never comes to code."""


@dataclass(frozen=True, kw_only=True)
class ReflectionSettings:
    """Limits how far a run goes with a problem."""

    rounds: int = 4
    """Most programs run before the problem is given up."""
    answers: int = 2
    """Most one-off answers drawn before the problem is given up."""
    mutants: int = 8
    """Most mutants of an answer that the tests are run on."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class ReflectionRun:
    """Everything that a run needs besides problems and a client."""

    out: Path
    """Folder of all its files."""
    protocol: Literal["chat", "tags"]
    settings: ReflectionSettings
    sandbox: SandboxKind
    limits: SandboxLimits
    """What a program may take."""
    at_a_time: int
    """Problems under way."""
    interpreters: int
    """Interpreters in use at a time."""

    def dialogue(self) -> GeneratorDialogue:
        """Return the way in which the generator is spoken to."""
        if self.protocol == "chat":
            return Chat()
        if self.protocol == "tags":
            return Tags()
        assert_never(self.protocol)

    def pipeline(self, client: LlmClient) -> str:
        """Return the hash of everything besides the problem that an outcome depends on."""
        sampling, settings = asdict(client.sampling), asdict(self.settings)
        template, model = self.dialogue().template, client.endpoint.model
        return content_hash([template, model, sampling, settings, self.sandbox, asdict(self.limits)])


def check_inputs(paths: Sequence[str], out: Path) -> None:
    """Protect inputs from a run's own files.

    Raises:
        ValueError: naming an input that a run in the folder ``out`` would write.
    """
    own = {(out / name).resolve() for name in (ATTEMPTS, EXECUTIONS, OUTCOMES, SAMPLES, REJECTS, STATS)}
    if taken := [path for path in paths if Path(path).resolve() in own]:
        raise ValueError(f"{taken[0]} is a file that this command writes; name another folder with --out")


async def reflect_all(run: ReflectionRun, records: Sequence[ReflectionProblem | Reject], client: LlmClient) -> int:
    """Solve all problems, write the files; return the exit code, 1 when problems or all samples are missing."""
    problems = [record for record in records if isinstance(record, ReflectionProblem)]
    with Results(run.out, run.pipeline(client)) as results:
        todo = [problem for problem in problems if not results.known(problem)]
        progress = ProblemProgress(client, len(problems), len(problems) - len(todo))
        if todo:
            await _solve_all(run, todo, results, client, progress)
        made = _report(run, records, results, client, progress)
        left = sum(not results.known(problem) for problem in problems)
    end = ending(client.stop, made=made, left=left, unit="problems")
    if end.line is not None:
        progress.line(end.line)
    return end.code


async def _solve_all(
    run: ReflectionRun,
    todo: Sequence[ReflectionProblem],
    results: Results,
    client: LlmClient,
    progress: ProblemProgress,
) -> None:
    async def work(problem: ReflectionProblem) -> None:
        outcome = await reflection.solve(problem)
        await results.add(problem, outcome)
        progress.step("accepted" if outcome.reason is None else "rejected")

    with (
        progress,
        client.stop.on_signals(),
        Interpreters(run.out, run.sandbox, run.limits, run.interpreters) as interpreters,
    ):
        runner = sandbox_runner(run.sandbox, run.limits)
        reflection = Reflection(client, interpreters, run.dialogue(), runner, run.settings)
        await for_each(todo, work, at_a_time=run.at_a_time, stop=client.stop)


def _report(
    run: ReflectionRun,
    records: Sequence[ReflectionProblem | Reject],
    results: Results,
    client: LlmClient,
    progress: ProblemProgress,
) -> int:
    """Write the files of the run and print what they hold; return the number of samples."""
    tally = OutcomeTally(len, "characters") if client.count is None else OutcomeTally(client.count, "tokens")
    results.write(records, tally)
    head = {"pipeline": results.pipeline, "model": client.endpoint.model, "protocol": run.protocol}
    stats = head | tally.stats(client)
    write_text(run.out / STATS, json.dumps(stats, indent=2) + "\n")
    for line in lines(stats, tally.unit):
        progress.line(line)
    progress.line(f"samples    {run.out / SAMPLES}")
    return int(stats["accepted"])


class Rejected(Exception):
    """Raised where a problem gives no sample: ``<kind>: <detail>``."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


class Reflection:
    """Takes problems through both stages and the verification, one after the other or many at a time."""

    def __init__(
        self,
        client: LlmClient,
        interpreters: Interpreters,
        dialogue: GeneratorDialogue,
        runner: Runner,
        settings: ReflectionSettings,
    ) -> None:
        self.client, self.interpreters, self.dialogue = client, interpreters, dialogue
        self.runner, self.settings = runner, settings

    async def solve(self, problem: ReflectionProblem) -> ProblemOutcome:
        """Take a problem through both stages.

        Raises:
            RunStopped: when the run is to end and the next answer is not in the journal.
        """
        outcome = ProblemOutcome()
        try:
            blocks = await self._reflect(problem, outcome)
            outcome.sample = await self._answer(problem, blocks, outcome)
        except Rejected as rejected:
            outcome.reason, outcome.final = str(rejected), rejected.final
        return outcome

    async def _reflect(self, problem: ReflectionProblem, outcome: ProblemOutcome) -> list[Block]:
        """Run stage 1; return the blocks as they happened, the last the output of a program whose tests passed."""
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

    async def _attempt(self, problem: ReflectionProblem, blocks: list[Block]) -> str:
        """Append prose and code; return the code."""
        for _ in range(_MOST_BLOCKS_A_ROUND):
            answer = await self._ask(self.dialogue.reflect(problem, blocks))
            try:
                step = self.dialogue.step(answer.text)
            except UnusableStep as error:
                raise Rejected(str(error)) from None
            if not step:
                raise Rejected("no code: the turn ended before its tests passed")
            blocks += step
            if step[-1].type == "code":
                return step[-1].content
        raise Rejected(f"no code: {_MOST_BLOCKS_A_ROUND} blocks of prose in a row")

    async def _answer(self, problem: ReflectionProblem, blocks: list[Block], outcome: ProblemOutcome) -> dict[str, Any]:
        """Run stage 2; return the sample with a one-off answer that holds."""
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

    async def _say(self, problem: ReflectionProblem, blocks: list[Block], number: int) -> list[Block]:
        said: list[Block] = []
        while len(said) < _MOST_BLOCKS_A_ROUND:
            answer = await self._ask(self.dialogue.answer(problem, blocks, said, number))
            try:
                part = self.dialogue.part(answer.text)
            except UnusableStep as error:
                raise Rejected(str(error)) from None
            said += part
            if not part or self.dialogue.one_part:
                break
        return said

    async def _verify(self, problem: ReflectionProblem, blocks: list[Block], said: list[Block]) -> AnswerVerdict:
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

    async def _ask(self, request: Request) -> ModelAnswer:
        try:
            answer = await self.client.ask(request)
        except RequestFailed as failure:
            raise Rejected(f"request failed: {failure}", final=failure.final) from None
        if answer.outcome != "ok":
            raise Rejected(f"{answer.outcome}: the answer to a request of stage {request.stage} ended before its end")
        try:
            storable_text(answer.text, f"the answer to a request of stage {request.stage}")
        except BadRecord as error:
            raise Rejected(str(error)) from None
        return answer


def _code(said: Sequence[Block]) -> str:
    codes = []
    for block in said:
        codes += [block.content] if block.type == "code" else [fence.code for fence in python_fences(block.content)]
    return "\n\n".join(codes).strip()


def _sample(problem: ReflectionProblem, blocks: Sequence[Block], said: Sequence[Block]) -> dict[str, Any]:
    """Return the four turns of the published schema, checked as training checks them."""
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
