import sys

# worker processes can import what is in a module with a name
from internvl3_jax.data.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
