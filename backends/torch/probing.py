"""Is a vendor's device here? Answered without its package, which takes seconds to import and may break `import torch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from porthal.hal import Probe


def probe_device(module: str, kind: str, files: str, visible: str) -> Probe:
    """From the vendor's `module` where it is loaded already, else from its device files in /dev, a pattern.

    `kind` is the device's type in PyTorch, `visible` the variable that hides devices of this vendor.
    """
    hidden = os.environ.get(visible)
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Probe("not here", f"{visible}={hidden!r} hides every device")
    if module in sys.modules:
        here = getattr(sys.modules["torch"], kind).is_available()
        return Probe("available") if here else Probe("not here", f"{module} sees no device")
    if not any(Path("/dev").glob(files)):
        return Probe("not here", f"there is no /dev/{files}: the driver is not loaded, or the container was not given a device")
    return Probe("available")
