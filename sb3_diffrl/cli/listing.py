"""``list``."""

import argparse
import re

from sb3_diffrl.cli.arguments import Subparsers
from sb3_diffrl.configs import load_yaml, nearest, packaged_hyperparams

#: Name on the command line -> class, and what it is.
ALGORITHMS = {
    "nclql": ("NCLQL", "online: Langevin dynamics on a noise-conditioned critic"),
    "lql": ("LQL", "online: the same on an ordinary critic"),
    "pg": ("PG", "offline: a diffusion planner whose noise comes from a learnt prior"),
    "planner": ("DiffusionPlanner", "offline: trajectory diffusion and inverse dynamics"),
    "diffusion_bc": ("DiffusionBC", "offline: behaviour cloning by a diffusion model of the actions"),
}


def add_commands(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "list",
        help="algorithms, and the tasks that there are settings for",
        description="List the package's algorithms with the tasks that it has settings for, or print one algorithm's settings.",
    )
    parser.add_argument("algo", nargs="?", help="print the settings of this one, e.g. nclql")
    parser.set_defaults(run=run_list)


def tasks(algo: str) -> list[str]:
    """Tasks that the package has settings for; other keys of the file are templates."""
    return [name for name in load_yaml(packaged_hyperparams(algo)) if re.search(r"-v\d+$", name)]


def run_list(args: argparse.Namespace) -> int:
    """``list``."""
    if args.algo is None:
        for algo, (name, text) in ALGORITHMS.items():
            print(f"{algo:13s} {name:17s} {text}")
            print("  " + "\n  ".join(tasks(algo)))
        print("Any other env or dataset is trained with the file's `default`. 'sb3-diffrl list ALGO' prints the file.")
        return 0
    if args.algo not in ALGORITHMS:
        raise ValueError(f"There is no algorithm {args.algo!r}: they are {', '.join(ALGORITHMS)}.{nearest(args.algo, ALGORITHMS)}")
    path = packaged_hyperparams(args.algo)
    print(f"# {path}\n{path.read_text()}", end="")
    return 0
