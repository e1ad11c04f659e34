"""`python -m wmss_jax` is `wmss`."""

from wmss_jax.cli import main

if __name__ == "__main__":
    main()
