"""`python -m minirec`, the same as the installed command `minirec`."""

from minirec.cli import main

if __name__ == "__main__":
    main(prog_name="python -m minirec")
