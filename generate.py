"""Make a video: python generate.py --help"""

from wan.__main__ import main

if __name__ == "__main__":
    main()
