"""Which device a command runs on."""

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is a CUDA GPU where there is one, else the CPU. Raises ValueError for no device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: legal are auto, cpu, cuda, cuda:0, …") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device
