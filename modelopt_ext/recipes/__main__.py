"""``python -m modelopt_ext.recipes``: write the presets as recipes, by default into the package itself."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from . import FOLDER, write


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(prog="python -m modelopt_ext.recipes", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the YAML files go")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    written = write(parser.parse_args().folder)
    logging.info("%d recipes in %s", len(written), written[0].parent)


if __name__ == "__main__":
    main()
