"""`python -m fedloom`: the command line, where the console script is not on the path."""

from fedloom.cli import main

if __name__ == "__main__":
    main()
