"""RL Zoo's own commands with the package's algorithms: ``python -m sb3_diffrl.zoo train --algo nclql --env Pendulum-v1``."""

from rl_zoo3.cli import main

import sb3_diffrl.zoo  # noqa: F401

if __name__ == "__main__":
    main()  # type: ignore[no-untyped-call]
