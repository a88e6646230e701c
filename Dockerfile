# On NVIDIA's PyTorch image, whose own builds of torch, Transformer Engine and Apex stay. Which Megatron-Core goes with
# which image, and how that is known: docs/versions.md. The older pair, whose bounds on Transformer Engine Megatron-Core
# names itself: --build-arg BASE=nvcr.io/nvidia/pytorch:25.12-py3 --build-arg MEGATRON_CORE=0.16.1
#
#   docker build -t megatron-tw .
#   docker run --rm megatron-tw                                   # shows the options of tools/train.py
#   docker run --rm --gpus all --ipc host --network host --ulimit memlock=-1 -v /data:/data megatron-tw \
#       bash examples/extend_llama3_32k.sh --load-hf /data/model --data-path /data/rows --save /data/run
ARG BASE=nvcr.io/nvidia/pytorch:26.02-py3
FROM ${BASE}
ARG MEGATRON_CORE=0.19.2

WORKDIR /opt/megatron_tw
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY megatron_tw megatron_tw
COPY tools tools
COPY examples examples
COPY tests tests

# The image's GPU stack keeps its versions, constraints.txt decides the rest. (The image's PIP_CONSTRAINT pins all that it
# holds, which does not resolve; it is switched off.)
RUN MEGATRON_CORE=${MEGATRON_CORE} bash tools/image_constraints.sh > /tmp/constraints.txt \
 && PIP_CONSTRAINT= pip install --no-cache-dir -c /tmp/constraints.txt -e '.[all,dev]' \
 && pip check \
 && python -c "import torch, transformer_engine.pytorch, apex, megatron.core, transformers, megatron_tw.training.loop"

CMD ["python", "tools/train.py", "--help"]
