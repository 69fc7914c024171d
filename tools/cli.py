"""The command ``reflectron``: from the words of the command line to one subcommand's exit code.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported when it was chosen:
``train`` is ``tools/train.py``, ``bench head`` is ``tools/bench/head.py``. Such a module must not import torch,
megatron or transformers at its top, but inside ``run``: ``--help`` and a mistyped argument are answered at once.
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

from reflectron.engine.terminal import protect_streams, protected_streams
from reflectron.engine.text import printable

_LONGEST_MESSAGE = 2000

COMMANDS = {
    "train": "train a model as a YAML file says",
    "validate": "loss terms of a model on held-out data",
    "inspect": "draw samples: roles, blocks, supervised tokens, what the student sees",
    "eval score": "pass@k of completions of a benchmark's problems or one's own",
    "eval run": "generate, score and report in one go",
    "eval ablate": "train and score a configuration without each part of the method, with intervals",
    "eval generate": "answers of a model to a benchmark's problems or one's own",
    "convert hf-to-dist": "Hugging Face checkpoint -> megatron-core's format, one tensor at a time",
    "convert dist-to-hf": "training checkpoint or megatron-core's format -> Hugging Face checkpoint",
    "convert verify": "compare two checkpoints of either format: tensors and logits",
    "data reflect": "make verified reflection samples with a model and an interpreter",
    "data oss-instruct": "have a model write problems and solutions that source code inspires",
    "data decontaminate": "exclude records that hold tasks of benchmarks, with the evidence",
    "data deduplicate": "exclude exact and near duplicates, and list their groups",
    "data analyse": "one page about a dataset: languages, categories, lengths, nearness to HumanEval",
    "data stats": "what a training set costs: lengths, student tokens, packs, tokens saved",
    "data visible-tags": "prepare a trained checkpoint for a server that hides special tokens",
    "bench head": "measure the distillation head against its peers: time, memory, errors",
    "bench train": "measure training steps against the reference's way and without each of the engine's parts",
    "bench gpu": "all that needs a GPU in nine minutes: correctness, speed, memory, as rows and a page",
    "bench checkpoint": "measure saving and loading of training checkpoints: time, stall, bytes",
    "bench corpus": "measure decontamination and deduplication of synthetic documents: time, memory",
    "bench data": "measure the making of reflection samples with a model that answers at once",
    "bench calibrate": "measure the rates that `plan` predicts with, on this machine",
    "bench faults": "kill a training again and again, damage its checkpoints, count what is lost",
    "bench freezes": "stop ranks of a training again and again: when it is noticed, what is lost",
    "plan": "predict layouts for a cluster: memory, time, GPU hours",
    "doctor": "what this machine has, what is missing and what that means",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        Its exit code; 2 for a mistake of the user, which is one line on stderr; 130 after Ctrl-C.
    """
    # Imports make a million objects that stay. Each time their number has grown by a quarter, Python looks through all
    # of them for garbage, by default from 70,000 on: a tenth of a start and more.
    gc.set_threshold(10_000)
    if argv is None:
        # For good: the traceback of a fault of ours, which may quote anything, is printed after this function.
        protect_streams()
    with protected_streams():
        args = _parse(sys.argv[1:] if argv is None else argv)
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
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    name = _command(argv)
    module = importlib.import_module("reflectron.tools." + name.replace(" ", ".").replace("-", "_"))
    command = argparse.ArgumentParser(prog=f"reflectron {name}", description=COMMANDS[name], allow_abbrev=False)
    module.add_arguments(command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=module.run, prog=command.prog)
    # Intermixed, so that an option may stand between CONFIG and key=value; argparse's own subcommands cannot do that.
    return command.parse_intermixed_args(argv[len(name.split()) :])


def _command(argv: Sequence[str]) -> str:
    """The command that the first two words or the first one name; ``--help``, ``--version`` and mistakes end here."""
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
