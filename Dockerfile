# The server. docker build -t qwen3-reranker . ; compose.yaml runs it.
FROM python:3.12-slim
ARG EXTRAS=serve
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[$EXTRAS]" \
    && rm -rf /src && useradd --create-home reranker
USER reranker
ENV HF_HOME=/home/reranker/models
RUN mkdir $HF_HOME
VOLUME /home/reranker/models
EXPOSE 8012
ENTRYPOINT ["qwen3-reranker"]
