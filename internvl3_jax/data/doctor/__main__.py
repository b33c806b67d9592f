import sys

from internvl3_jax.data.doctor.examine import main  # worker processes can import what is in a module with a name

if __name__ == "__main__":
    sys.exit(main())
