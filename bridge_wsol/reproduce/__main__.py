"""What the paper is compared with, and what it shows: experiments over many runs, figures, and numbers.

python -m bridge_wsol.reproduce COMMAND --help      the flags of a command
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from ..utils import Parser, one_line_errors, set_quiet, user_path, write_json
from . import experiments, figures


def sweep(args: argparse.Namespace) -> None:
    """Fig. A5: accuracy against a hyperparameter.

    With --param it trains the missing runs first, and draws their file.
    """
    if args.param:
        path = experiments.sweep(args)
        if not figures.has_matplotlib():
            print(f"to draw it, with matplotlib: python -m bridge_wsol.reproduce sweep {path}")
            return
        drawn = {"files": [path], "out": path.with_suffix(""), "width": figures.COLUMN, "dpi": figures.DPI}
        args = argparse.Namespace(**drawn)
    figures.sweep(args)


COMMANDS = experiments.COMMANDS | {"sweep": sweep} | figures.COMMANDS


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of a command; `flags` are those for train.py, `out` has no suffix. Raises InputError."""
    parser = Parser(prog="python -m bridge_wsol.reproduce", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sweeps = argv[:1] == ["sweep"] and any(x.split("=")[0] in ("--param", "--values") for x in argv)
    trains = sweeps or argv[:1] == ["compare"]
    for name, command in COMMANDS.items():
        # No abbreviations: --p is a flag of train.py, and not short for --param.
        what, about = command.__doc__.splitlines()[0], inspect.getdoc(command)
        sub = commands.add_parser(name, help=what, description=about, allow_abbrev=False)
        (experiments if name in experiments.COMMANDS else figures).add_flags(sub, name)
        if name == "sweep" and not trains:  # --width and the words after flags of train.py are train.py's
            sub.add_argument(
                "files", nargs="+", type=user_path, metavar="FILE", help="JSON files of earlier sweeps"
            )
            figures.add_file_flags(sub, name)
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and not trains:
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if getattr(args, "out", Path()).suffix in (".png", ".pdf", ".json", ".md", ".csv"):
        args.out = args.out.with_suffix("")
    (experiments if trains else figures).check(args)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    set_quiet(getattr(args, "quiet", False))
    if (numbers := COMMANDS[args.command](args)) is not None:
        write_json(Path(f"{args.out}.json"), numbers)
        print(f"written to {args.out}.json")


if __name__ == "__main__":
    with one_line_errors():
        main()
