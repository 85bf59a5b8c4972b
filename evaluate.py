"""Score models side by side: python evaluate.py --model blip --model vlp. The same as `readroom evaluate`."""

import sys

from readroom.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]], prog_name="readroom")
