"""Devices by name."""

import torch


def check_device(device: str | torch.device) -> torch.device:
    """Return the device meant.

    Raises:
        ValueError: no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        # An unknown name is a RuntimeError, something else than a name a TypeError; a build of torch without the device
        # answers with AssertionError or NotImplementedError.
        kinds = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device {str(device)!r} cannot be used ({reason}); torch sees {kinds}") from None
    return found
