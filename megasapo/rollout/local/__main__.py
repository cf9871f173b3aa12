"""`python -m megasapo.rollout.local`: the same as `megasapo serve`."""

import sys

from megasapo.rollout.local import main

if __name__ == "__main__":
    sys.exit(main())
