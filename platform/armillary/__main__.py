"""``python -m armillary`` is the same program as the console script ``armillary``."""

from armillary.cli.main import main

if __name__ == "__main__":
    main()
