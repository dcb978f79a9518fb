"""``python -m tritprune``: find the config tree and hand over."""

import sys
from pathlib import Path


def main() -> None:
    """Run the command line and exit with its status."""
    here = Path(__file__).resolve().parent
    config_tree = here / "conf" if (here / "conf").is_dir() else here.parent / "conf"
    from tritprune.app import main as run

    sys.exit(run(config_tree))


if __name__ == "__main__":
    main()
