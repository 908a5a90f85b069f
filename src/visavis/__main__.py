"""`python -m visavis` runs the `visavis` command line."""

from visavis.cli import main

if __name__ == "__main__":
    main()
