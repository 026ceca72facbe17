"""What each command of `talk-dist` does; cli.py reads the options and calls."""
