import sys

from internvl3_jax.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
