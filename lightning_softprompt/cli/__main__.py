"""`python -m lightning_softprompt.cli`."""

from lightning_softprompt.cli.main import main

if __name__ == "__main__":
    main()
