"""Builds what DeepSpeed compiles at first use, for the tests that need it:  python -m tests.operations"""

from dsllama.training.engine import accelerator, find_ninja
from dsllama.training.operations import make_ready

if __name__ == "__main__":
    accelerator()
    find_ninja()
    make_ready({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, is_main=True)
