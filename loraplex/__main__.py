"""`python -m loraplex`: the `loraplex` command, also where it is not installed."""

from loraplex.command import main

if __name__ == "__main__":
    raise SystemExit(main())
