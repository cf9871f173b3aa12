# megasapo's learner on NVIDIA's PyTorch, and SGLang in an environment of its own.
#   docker build -t megasapo:0.1.0 .
#   docker run --gpus all --ipc=host -v "$PWD":/work megasapo:0.1.0 train examples/arithmetic/sapo.yaml
# 26.01 holds, by public reports: Ubuntu 24.04, Python 3.12, CUDA 13.1, PyTorch 2.10.0a0, Transformer Engine 2.11.0, and, as
# earlier ones did, NVIDIA's Apex, which nothing here needs. 26.02 has Transformer Engine 2.12, which setup.py leaves out. This
# recipe has not been built; what it relies on is checked while it is.
FROM nvcr.io/nvidia/pytorch:26.01-py3

ARG MEGATRON_CORE=0.19.2
ARG TRANSFORMERS=5.23.0
ARG SGLANG=0.5.21
ARG UID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# curl: health checks of servers; tini: reaps what a killed server leaves behind. The base's tag pins the archive's state
# well enough: Ubuntu removes old versions, so that pinned ones soon fail.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends curl python3-venv tini \
 && rm -rf /var/lib/apt/lists/*

# SGLang pins a torch of its own, which NVIDIA's constraints (PIP_CONSTRAINT) would forbid.
RUN python -m venv /opt/sglang \
 && PIP_CONSTRAINT="" /opt/sglang/bin/pip install --no-cache-dir "sglang==${SGLANG}" \
 && find /opt/sglang -name __pycache__ -type d -prune -exec rm -rf {} +

# The dependencies first: a change of the code leaves this layer as it is. NVIDIA's constraints keep its torch.
WORKDIR /opt/megasapo
COPY setup.py pyproject.toml README.md ./
COPY megasapo/__init__.py megasapo/__init__.py
RUN python -c 'import torch; print("torch==" + torch.__version__)' > /tmp/torch.txt \
 && pip install --no-cache-dir --constraint /tmp/torch.txt \
      "megatron-core==${MEGATRON_CORE}" "transformers==${TRANSFORMERS}" "nvidia-ml-py>=12" . \
 && pip uninstall --yes megasapo \
 && rm -rf /tmp/torch.txt build ./*.egg-info

COPY megasapo megasapo
COPY tools tools
COPY examples examples
RUN pip install --no-cache-dir --no-deps --editable . \
 && python -c 'from importlib.metadata import version; from packaging.specifiers import SpecifierSet; \
[print(name, version(name)) for name in ("torch", "transformer_engine", "megatron-core")]; \
assert version("transformer_engine") in SpecifierSet(">=2.11,<2.12")'

# The base image may have a user of this number (ubuntu); its name does not matter, that it is not root does.
RUN (getent passwd "${UID}" > /dev/null || useradd --create-home --uid "${UID}" megasapo) \
 && install -d -o "${UID}" /work
USER ${UID}
WORKDIR /work

# as the batch script's knob of that name
ENV SERVER_PYTHON=/opt/sglang/bin/python \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1

# A container with RUN_DIR is as well as the run that it names; others only have to start python.
HEALTHCHECK --interval=60s --timeout=30s --start-period=900s --retries=3 \
    CMD if [ -n "${RUN_DIR:-}" ]; then megasapo watch "$RUN_DIR" --once > /dev/null; else megasapo --version > /dev/null; fi

ENTRYPOINT ["/usr/bin/tini", "--", "megasapo"]
CMD ["--help"]
