"""``plot``."""

import argparse
import json
from pathlib import Path

from sb3_diffrl.cli.arguments import Parser, Subparsers
from sb3_diffrl.cli.playing import add_run, open_run

EXAMPLES = """examples:
  sb3-diffrl plot curves logs -o curves.png
  sb3-diffrl plot curves "NC-LQL=logs/nclql" SAC=logs/sac -o curves.png
  sb3-diffrl plot profiles logs -o profiles.png
  sb3-diffrl plot q-landscape logs/nclql/HalfCheetah-v5_1 -o landscape.gif --dims 0 3
  sb3-diffrl plot plans logs/pg/sb3-diffrl-pointmaze-umaze-v0_1 -o plans.png
  sb3-diffrl plot timesteps logs/diffusion_bc/my-data_1 logs/diffusion_bc/my-data_2 -o timesteps.png"""


def add_commands(commands: Subparsers) -> None:
    """Add the command."""
    plot = commands.add_parser(
        "plot",
        help="figures of logs and agents",
        description="Draw a figure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds: Subparsers = plot.add_subparsers(title="figures", metavar="FIGURE", required=True)

    curves = _add(kinds, "curves", "learning curves: IQM over runs with bootstrap intervals")
    curves.add_argument("--monitor", action="store_true", help="training episodes (monitor.csv) in place of evaluations")
    curves.add_argument("--window", type=int, default=20, help="training episodes to average over (default: 20)")
    curves.set_defaults(run=run_curves)

    profiles = _add(kinds, "profiles", "performance profiles, IQM, median, mean, probability of improvement")
    profiles.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    profiles.set_defaults(run=run_profiles)
    for parser in (curves, profiles):
        parser.add_argument("sources", nargs="+", metavar="[LABEL=]FOLDER", help="folders of runs, at any depth")

    landscape = _add(
        kinds, "q-landscape", "critic's values of a state's actions with Langevin chains on them; .gif shows them walk"
    )
    _add_agent(landscape)
    landscape.add_argument("--dims", type=int, nargs="+", default=[0, 1], help="one or two dimensions of the action (default: 0 1)")
    landscape.add_argument("--at-step", type=int, default=0, help="env step of an episode at which to look (default: 0)")
    landscape.add_argument("--n-chains", type=int, default=32, help="chains to run (default: 32)")
    landscape.set_defaults(run=run_landscape)

    plans = _add(kinds, "plans", "plans of a planner over its maze")
    _add_agent(plans)
    plans.add_argument("--n-plans", type=int, default=16, help="plans from each start (default: 16)")
    plans.add_argument("--n-starts", type=int, default=4, help="starts (default: 4)")
    plans.set_defaults(run=run_plans)

    timesteps = _add(kinds, "timesteps", "density of the diffusion times that offline agents train on")
    timesteps.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="folders of offline agents' runs, one line each")
    _add_seed(timesteps)
    timesteps.set_defaults(run=run_timesteps)


def _add(kinds: Subparsers, name: str, text: str) -> Parser:
    parser = kinds.add_parser(name, help=text, description=f"Draw {text}.")
    parser.add_argument("-o", "--output", type=Path, default=Path(f"{name}.png"), help=f"file to write (default: {name}.png)")
    return parser


def _add_agent(parser: Parser) -> None:
    add_run(parser)
    _add_seed(parser)
    parser.add_argument("--trust", action="store_true", help="run code that files name or hold: configurations, pickles")


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn at random (default: 0)")


def _said(path: Path) -> int:
    print(path)
    return 0


def run_curves(args: argparse.Namespace) -> int:
    """``plot curves``."""
    from sb3_diffrl.plots import plot_curves, read_curves

    return _said(plot_curves(read_curves(args.sources, args.monitor, args.window), args.output))


def run_profiles(args: argparse.Namespace) -> int:
    """``plot profiles``."""
    from sb3_diffrl.plots import plot_profiles, read_curves

    path, numbers = plot_profiles(read_curves(args.sources), args.output)
    for name, values in numbers.items():
        print(f"{name}: {values}")
    if args.json is not None:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return _said(path)


def run_landscape(args: argparse.Namespace) -> int:
    """``plot q-landscape``."""
    from sb3_diffrl.lql import LQL
    from sb3_diffrl.plots import plot_q_landscape

    run = open_run(args)
    env = run.make_env(seed=args.seed, trust=args.trust)
    model = run.load(run.model_path(args.best, args.checkpoint), env, seed=args.seed, trust=args.trust)
    if not isinstance(model, LQL):
        raise ValueError(f"{run.algo} has no Langevin chains: the landscape is for nclql and lql.")
    obs = env.reset()
    for _ in range(args.at_step):
        obs = env.step(model.predict(obs, deterministic=True)[0])[0]  # type: ignore[arg-type]
    title = f"{run.env_id}, step {args.at_step} of an episode"
    return _said(plot_q_landscape(model, obs, args.output, tuple(args.dims), args.n_chains, args.seed, title))  # type: ignore[arg-type]


def run_plans(args: argparse.Namespace) -> int:
    """``plot plans``."""
    from sb3_diffrl.planner import DiffusionPlanner
    from sb3_diffrl.plots import plot_plans

    run = open_run(args)
    env = run.make_env(seed=args.seed, trust=args.trust)
    model = run.load(run.model_path(args.best, args.checkpoint), env, seed=args.seed, trust=args.trust)
    if not isinstance(model, DiffusionPlanner):
        raise ValueError(f"{run.algo} does not plan: plans are for planner and pg.")
    return _said(plot_plans(model, env, args.output, args.n_plans, args.n_starts, args.seed))


def run_timesteps(args: argparse.Namespace) -> int:
    """``plot timesteps``."""
    import sb3_diffrl.zoo  # noqa: F401
    from sb3_diffrl.bc import DiffusionBC
    from sb3_diffrl.planner import DiffusionPlanner
    from sb3_diffrl.plots import plot_timesteps
    from sb3_diffrl.zoo import ALGORITHMS
    from sb3_diffrl.zoo.runs import Run

    models = {}
    for folder in args.folders:
        run = Run.open(folder)
        algorithm = ALGORITHMS.get(run.algo)
        if algorithm is None or not issubclass(algorithm, (DiffusionBC, DiffusionPlanner)):
            raise ValueError(f"{folder} is a run of {run.algo}: densities are for diffusion_bc, planner and pg.")
        name = f"{run.algo}, {run.hyperparams.get('timestep_sampler', 'uniform')} ({folder.name})"
        models[name] = algorithm.load(run.model_path())
    return _said(plot_timesteps(models, args.output, args.seed))
