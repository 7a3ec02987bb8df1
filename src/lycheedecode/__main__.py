"""`python -m lycheedecode` is the command `lycheedecode`."""

from .cli import main

if __name__ == "__main__":
    main()
