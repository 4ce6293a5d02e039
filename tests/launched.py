"""Runs several training runs one after the other in the ranks of one real launch, to share its start-up.

deepspeed --num_gpus R tests/launched.py runs.json      runs.json: a list of argument lists
"""

import json
import sys

from dsllama.training.run import leave, main

if __name__ == "__main__":
    with open(sys.argv[-1], encoding="utf-8") as file:
        runs = json.load(file)
    leave(max(main(arguments) for arguments in runs))
