"""`python -m helios_jax <command>` is `helios <command>`."""

from helios_jax.cli import main

if __name__ == '__main__':
    main()
