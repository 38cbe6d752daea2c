"""`python -m moecast`."""

from moecast.cli import main

if __name__ == "__main__":
    main()
