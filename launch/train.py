"""What `deepspeed launch/train.py --config configs/x.yaml` runs on every rank."""

import sys

from dsllama.training.run import leave, main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
