"""Make a video: python generate.py --help"""

import sys

from wan.cli import main

if __name__ == "__main__":
    sys.exit(main())
