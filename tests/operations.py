"""Builds what DeepSpeed compiles at first use, for the tests that need it:  python -m tests.operations"""

from dsllama.training.engine import accelerator, find_ninja

if __name__ == "__main__":
    accelerator()
    find_ninja()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)
