import sys

# Worker processes import it by name, which they cannot do with __main__.
from internvl3_jax.data.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
