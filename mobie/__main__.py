"""`python -m mobie`."""

from mobie.cli import main

if __name__ == "__main__":
    main()
