"""Package metadata. Exact versions live in requirements.lock; the ranges here say what the code is written for."""

from setuptools import find_packages, setup

setup(
    name="ctpo_megatron",
    version="0.1.0",
    description="RL post-training with CTPO on Ray, SGLang and Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ctpo_megatron", "ctpo_megatron.*"]),
    install_requires=[
        "sglang>=0.5.23,<0.6",
        "megatron-core>=0.16.1,<0.17",
        "ray[default]>=2.60,<3",
        "torch>=2.11",
        "transformers>=5.19,<6",
        "tokenizers>=0.21",
        "tensorboard>=2.21,<3",
        "tensorboardX>=2.6",
        "math-verify>=0.9,<1",
        "numpy>=2",
        "packaging>=24",
        "pydantic>=2.10",
        "pydantic-core>=2.27",
        "omegaconf>=2.3",
        "pyyaml>=6",
        "typer>=0.15",
        "rich>=13",
        "aiohttp>=3.11",
        "psutil>=7",
        "safetensors>=0.5",
        "numba>=0.60",
        "nvidia-ml-py>=12",
        "pyarrow>=18",
        "jinja2>=3.1",
    ],
    extras_require={
        # NVIDIA apex is not on PyPI (the package of that name there is another one); on GPU hosts build it from source:
        #   git clone https://github.com/NVIDIA/apex && cd apex
        #   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .
        "gpu": ["transformer-engine[pytorch]>=2.8"],
        "dev": [  # what the tests and tools need besides
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pytest-instafail>=0.5",
            "hypothesis>=6.120",
            "psutil>=6",
            "matplotlib>=3.10",
            "scipy>=1.14",
            "annotated-types>=0.7",
            "ruff>=0.9",
            "mypy>=2.4",
            "types-psutil>=7",
            "types-PyYAML>=6",
            "types-requests>=2.32",
            "requests>=2.32",
        ],
    },
    entry_points={
        "console_scripts": ["ctpo = ctpo_megatron.cli:main"],
        "sglang.srt.platforms": ["ctpo_cpu = ctpo_megatron.engine.sglang.platform:activate"],
        "sglang.srt.plugins": ["ctpo_digest = ctpo_megatron.engine.sglang.digest:activate"],
    },
)
