# Octet on NVIDIA's PyTorch container, which brings CUDA, torch and TensorRT. Its torch is kept: it is built for its CUDA.
#
#   docker build -t octet .
#   docker build -t octet --build-arg TAG=26.01-py3 .
#   docker run --rm --gpus all --ipc=host --user "$(id -u)" -v "$PWD/runs:/work/runs" -v /path/to/data:/data:ro octet \
#       scripts/val_trt.sh runs/bccd/latest /data 320
#
# --user: the owner of runs. Such a user has no name and no home in the image, so that both are set for all.
#
# TAG: any container with Python 3.11 or newer and torch 2.10 or newer; the container's release notes tell.
ARG TAG=25.12-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHON=python
WORKDIR /work

# What the container has is not to be replaced: every package of it becomes a constraint, torch and torchvision are not asked for.
COPY pyproject.toml ./
RUN python -c "import sys, torch; found = tuple(int(n) for n in torch.__version__.split('.')[:2]); \
assert sys.version_info >= (3, 11) and found >= (2, 10), f'Python {sys.version}, torch {found}: choose a newer TAG'" \
    && python -c "import torch; print(torch.__version__)" > /tmp/torch.before \
    && pip list --format=freeze | grep -iE '^(torch|torchvision|triton|tensorrt|numpy)==' > /tmp/container.txt \
    && python -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
names = project['dependencies'] + project['optional-dependencies']['fast-metrics']; \
print('\n'.join(n for n in names if not n.startswith(('torch', 'torchvision'))))" > /tmp/requirements.txt \
    && pip install --no-cache-dir --constraint /tmp/container.txt --requirement /tmp/requirements.txt \
    && python -c "import torch; print(torch.__version__)" | diff /tmp/torch.before - \
    && rm /tmp/torch.before /tmp/container.txt /tmp/requirements.txt

RUN useradd --create-home --shell /bin/bash --uid 10001 octet && mkdir -p runs && chown octet:octet /work runs
COPY --chown=octet:octet . .
ENV HOME=/tmp USER=octet
USER 10001
CMD ["python", "train_qat.py", "+experiment=demo"]
