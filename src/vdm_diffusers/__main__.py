"""`python -m vdm_diffusers`: the command line."""

import sys

from vdm_diffusers.command_line import main

if __name__ == "__main__":
    sys.exit(main())
