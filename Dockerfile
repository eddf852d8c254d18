# The server. docker build -t qwen3-reranker . ; compose.yaml runs it.
# Python 3.12.14 on Debian 13, of August 2026. For a newer one: docker pull python:3.12-slim, and
# the digest that it prints.
FROM python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
# What is installed: a lock in docker/, serve or ui, each file in it by its hash. x86_64 only.
ARG LOCK=serve
COPY . /src
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r "/src/docker/$LOCK.txt" \
    && pip install --no-cache-dir --no-deps --no-index --no-build-isolation /src \
    && rm -rf /src && useradd --create-home reranker
USER reranker
ENV HF_HOME=/home/reranker/models
RUN mkdir $HF_HOME
VOLUME /home/reranker/models
EXPOSE 8012
ENTRYPOINT ["qwen3-reranker"]
