"""``python -m sb3_diffrl`` is the command ``sb3-diffrl``."""

from sb3_diffrl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
