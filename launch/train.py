"""What `deepspeed launch/train.py --config configs/x.yaml` runs on every rank."""

import sys

from dsllama.training.run import exit_process, main

if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
