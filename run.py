"""The command line from a checkout: `python run.py demo`. After `pip install .` the same is called `maskclip`."""

from maskclip_jax.cli import main

if __name__ == "__main__":
    main()
