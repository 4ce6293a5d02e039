"""What `deepspeed launch/train.py --config configs/x.yaml` runs on every rank."""

from dsllama.training.stopping import command

if __name__ == "__main__":
    command()
