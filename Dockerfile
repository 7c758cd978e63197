# One image for all that a cluster runs: Ray's head and workers, clients that submit jobs, the MLflow server.
#   docker build --tag corun-ray:0.1.0 .                                  for nodes with NVIDIA GPUs
#   docker build --tag corun-ray:0.1.0-cpu --build-arg ACCELERATOR=cpu .  about 1.1 GB smaller
# The CUDA libraries come with the locked wheels, the driver from the node; so one base image serves both.
ARG BASE=python:3.11-slim-bookworm

# --- the locked dependencies, in a virtual environment -----------------------------------------------------------
FROM ${BASE} AS dependencies
ARG ACCELERATOR=gpu
RUN case "${ACCELERATOR}" in gpu|cpu) ;; *) echo "ACCELERATOR=${ACCELERATOR}: expected gpu or cpu" >&2; exit 1 ;; esac
COPY requirements-image.lock /tmp/
# --no-deps: the lock is complete, and pip would otherwise add pyiqa's GUI build of OpenCV.
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement /tmp/requirements-image.lock
# What PyTorch's CUDA build loads only when it meets a GPU. The other CUDA libraries it needs to be imported at all.
RUN if [ "${ACCELERATOR}" = cpu ]; then /opt/venv/bin/pip uninstall --yes triton nvidia-cusolver; fi

# --- the image ---------------------------------------------------------------------------------------------------
FROM ${BASE}
# /spill: where Ray's object store goes when memory is full; a volume there belongs to the user then.
# g++: torch.compile builds kernels while training. wget: KubeRay's own probes and the check below call it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash ray \
    && install --directory --owner=ray --group=ray /spill
COPY --from=dependencies /opt/venv /opt/venv
# `python3` and `ray` are the environment's; a job file's first line relies on that.
# Without a token no Ray starts: RAY_AUTH_TOKEN, or a file that RAY_AUTH_TOKEN_PATH names.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/corun_ray
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY corun_ray corun_ray
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && rm -rf build *.egg-info
COPY jobs jobs
USER 1000:1000
WORKDIR /home/ray
EXPOSE 6379 8265 10001
# Head and workers alike; other uses of the image bring their own check or turn this one off.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["wget", "--quiet", "--tries=1", "--output-document=/dev/null", "http://127.0.0.1:52365/api/healthz"]
CMD ["ray", "start", "--head", "--block"]
