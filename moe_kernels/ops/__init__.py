"""``torch.library`` ops, one file a stage: schema, fake kernel, autograd, autocast, FLOPs.

Backends give the kernels (``Operator.implement``); everything that PyTorch has to know about an op
is here, once.
"""
