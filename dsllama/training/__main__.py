"""What `dsllama launch` has every rank run: the same as launch/train.py, wherever it is installed."""

from dsllama.training.stopping import command

if __name__ == "__main__":
    command()
