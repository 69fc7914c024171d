"""The command ``reflectron``: from the words of the command line to one subcommand's exit code.

A command is one word or two; the first names a module of ``tools/commands``, imported when it was chosen, whose
``SUBCOMMANDS`` maps the second word ("" where there is none) to the functions that declare the arguments and run it.
Such a module imports torch, megatron, transformers, datasets or pandas only inside functions: ``--help`` and a
mistyped argument are answered at once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from reflectron.engine.files import printable
from reflectron.engine.terminal import protect_streams, protected_streams

_LONGEST_MESSAGE = 2000

COMMANDS = {
    "train": "train a model as a YAML file says",
    "validate": "compute a model's loss terms on held-out data",
    "inspect": "draw samples: roles, blocks, supervised tokens, what the student sees",
    "eval score": "compute pass@k of completions of a benchmark's problems or your own",
    "eval run": "generate, score and report in one go",
    "eval ablate": "train and score a configuration without each part of the method, with intervals",
    "eval generate": "generate a model's answers to a benchmark's problems or your own",
    "convert hf-to-dist": "convert a Hugging Face checkpoint to megatron-core's format, one tensor at a time",
    "convert dist-to-hf": "convert a training checkpoint, or megatron-core's format, to a Hugging Face checkpoint",
    "convert verify": "compare two checkpoints of either format: tensors and logits",
    "data reflect": "generate verified reflection samples with a model and an interpreter",
    "data oss-instruct": "have a model write problems and solutions inspired by source code",
    "data decontaminate": "exclude records that contain benchmark tasks, with the evidence",
    "data deduplicate": "exclude exact and near duplicates, and list their groups",
    "data analyse": "write one page about a dataset: languages, categories, lengths, similarity to HumanEval",
    "data stats": "report what a training set costs: lengths, student tokens, packs, tokens saved",
    "data visible-tags": "prepare a trained checkpoint for a server that hides special tokens",
    "bench head": "measure the distillation head against its peers: time, memory, errors",
    "bench train": "measure training steps against the reference implementation and without each part of the engine",
    "bench gpu": "check everything that needs a GPU in nine minutes: correctness, speed, memory",
    "bench checkpoint": "measure saving and loading of training checkpoints: time, stall, bytes",
    "bench corpus": "measure decontamination and deduplication of synthetic documents: time, memory",
    "bench data": "measure the generation of reflection samples with a model that answers at once",
    "bench calibrate": "measure the rates that `plan` predicts with, on this machine",
    "plan": "predict layouts for a cluster: memory, time, GPU hours",
    "doctor": "report what this machine has, what is missing and what that means",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        Its exit code; 2 for a mistake of the user, which is one line on stderr; 130 after Ctrl-C.
    """
    # Imports create a million objects that stay. Each time their number has grown by a quarter, Python scans all of
    # them for garbage, by default from 70,000 on: a tenth of the start-up time and more.
    gc.set_threshold(10_000)
    if argv is None:
        # Permanently: the traceback of a bug of ours, which may quote anything, is printed after this function.
        protect_streams()
    with protected_streams():
        try:
            args = _parse(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            return 130
        return guarded(args.prog, lambda: args.run(args), debug=args.debug)


def guarded(prog: str, action: Callable[[], int], *, debug: bool) -> int:
    """Call ``action``; ``ValueError`` and ``OSError`` become one line and exit code 2, all else keeps its traceback."""
    try:
        return action()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `reflectron inspect ... | head`; what is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {printable(_message(error), _LONGEST_MESSAGE)}", file=sys.stderr)
        return 2


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        # A rename names two files: the one to be replaced, and a temporary one.
        name = error.filename2 or error.filename
        return f"{name}: {error.strerror}" if name else error.strerror
    return str(error)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    name = _command(argv)
    group, _, word = name.partition(" ")
    add_arguments, run = importlib.import_module(f"reflectron.tools.commands.{group}").SUBCOMMANDS[word]
    command = argparse.ArgumentParser(prog=f"reflectron {name}", description=COMMANDS[name], allow_abbrev=False)
    add_arguments(command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, prog=command.prog)
    # Intermixed, so that an option may stand between CONFIG and key=value; argparse's own subcommands cannot do that.
    return command.parse_intermixed_args(argv[len(name.split()) :])


def _command(argv: Sequence[str]) -> str:
    """Return the command that the first two words or one name; ``--help``, ``--version`` and mistakes end here."""
    named = [name for name in (" ".join(argv[:2]), *argv[:1]) if name in COMMANDS]
    if not named:
        group = [name for name in COMMANDS if argv and name.startswith(f"{argv[0]} ")]
        parser = _top_parser(group or list(COMMANDS))
        parser.parse_known_args(argv)
        given = " ".join(argv[: 2 if group else 1])
        parser.error(f"there is no command {given!r}, expected one of: {', '.join(group or COMMANDS)}")
    return named[0]


def _top_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name]}" for name in names]
    parser = argparse.ArgumentParser(
        prog="reflectron",
        usage="reflectron [--version] COMMAND ...",
        description="Train code models with ReflectionCoder's and Magicoder's methods.",
        epilog="\n".join(["commands:", *lines, "", "reflectron COMMAND --help lists the arguments of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = importlib.metadata.version("reflectron")
    parser.add_argument("--version", action="version", version=f"reflectron {version}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
