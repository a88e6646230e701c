# On NVIDIA's PyTorch image, whose own builds of torch, Transformer Engine and Apex stay. Megatron-Core and Transformer
# Engine must fit: 0.16 asks for 2.9 to 2.11, and this release of the image has 2.10. Megatron-Core 0.19 names no bound;
# it is tested by its makers with 2.16 and 2.17, which they build into the image (releases 25.09 and 26.06) themselves.
# To try it with an image's own: --build-arg BASE=... --build-arg MEGATRON_CORE=0.19.2.
#
#   docker build -t megatron-tw .
#   docker run --rm megatron-tw                                   # shows the options of tools/train.py
#   docker run --rm --gpus all --ipc host --network host --ulimit memlock=-1 -v /data:/data megatron-tw \
#       bash examples/extend_llama3_32k.sh --load-hf /data/model --data-path /data/rows --save /data/run
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}
ARG MEGATRON_CORE=0.16.1

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
