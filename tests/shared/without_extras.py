"""A plugin of pytest under which hypothesis and diffusers cannot be imported."""

import sys
from typing import Any

modules: dict[str, Any] = sys.modules
modules.update(dict.fromkeys(("hypothesis", "diffusers")))
