"""Fresh weights of the layers that every module here is made of."""

from torch import nn

EMBEDDING_STD = 0.02


def reset_layers(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases on each ``nn.Linear`` inside, unit norms."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            layer.reset_parameters()


def zero_linear(layer: nn.Linear) -> None:
    """All zeros: the branch behind this layer starts without effect."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
