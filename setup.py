"""Install dsllama. PyTorch comes first, in the build that fits the machine: see the Makefile and the README."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dsllama",
    version="0.1.0",
    description="Pretrain Llama-style models with DeepSpeed: raw text in, a model the ecosystem loads out",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dsllama", "dsllama.*"]),
    package_data={"dsllama": ["quickstart.yaml"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=1.26",
        "tokenizers>=0.20",
        "pydantic>=2.7",
        "tensorboard>=2.14",
        "setuptools",  # torch's TensorBoard writer and DeepSpeed's op builder import parts of it
        "pyyaml>=6",
        "safetensors>=0.4",
        "huggingface_hub>=0.25",  # which plans the files of an export; tokenizers needs it anyway
        "matplotlib>=3.8",
        "tqdm>=4.60",
        "psutil>=5",
        "tiktoken>=0.13",
        "backports.zstd>=1; python_version < '3.14'",
    ],
    extras_require={
        "formats": ["pyarrow>=14"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-rerunfailures>=15",
            "hypothesis>=6",
            "transformers>=4.45",
            "accelerate>=1.1",
            "pyarrow>=14",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["dsllama = dsllama.cli:main"]},
)
