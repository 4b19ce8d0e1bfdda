#!/usr/bin/env python3
"""The command line of minirec: `python cli.py --help` shows the way. Its commands live in minirec/cli/."""

from minirec.cli import main

if __name__ == "__main__":  # a spawned worker process imports this file anew
    main(prog_name="python cli.py")
