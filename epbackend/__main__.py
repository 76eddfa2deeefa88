"""`python -m epbackend` is the `epbackend` command."""

from epbackend.cli import main

if __name__ == "__main__":
    main()
