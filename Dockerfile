# k4p1 with the versions of constraints.txt, as user 10001; nothing is written outside /tmp and mounted folders.
#
#   docker build --tag k4p1:0.1.0 .
#
# Without a network: put a wheelhouse beside this file (docs/operations.md) and add
#   --build-arg PIP_FLAGS="--no-index --find-links wheelhouse"
# BASE may name a mirror of the Python image; EXTRAS is empty or the extras to install, such as [cuda].
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG PIP_FLAGS=""
ARG EXTRAS=""
WORKDIR /src
COPY . .
RUN python -m venv /opt/k4p1 \
 && /opt/k4p1/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_FLAGS} --constraint constraints.txt ".${EXTRAS}" \
 && find /opt/k4p1 -name __pycache__ -prune -exec rm -rf {} +

FROM ${BASE}
COPY --from=build /opt/k4p1 /opt/k4p1
ENV PATH=/opt/k4p1/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["k4p1"]
CMD ["--help"]
