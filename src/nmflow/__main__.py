"""`python -m nmflow`: the command without an installation."""

from nmflow.cli import main

if __name__ == "__main__":
    main()
